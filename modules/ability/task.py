"""What a task of general ability is: questions from a file, put to a model, and a rule by which answers are judged.

A task knows nothing of edits. It is put to any `Edited`, so the unedited model and every editor are asked the same.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from datamodules.tokens import encode
from modules.asked import Asked
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.metrics import summarise

Answer = Mapping[str, Any]  # JSON values


@dataclass(frozen=True)
class Example:
    """One question.

    Args:
        id: within the task.
        prompt: the text that is to be answered.
        answers: what is right; of a choice one of the options.
        options: to choose among; none where the model writes.
        head: stands before everything.
        shots: solved questions between head and prompt; the last ones are left out where they do not fit.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    head: str = ""
    shots: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.prompt.strip() or not self.answers or not all(a.strip() for a in self.answers):
            raise ValueError(f"example {self.id!r} needs a prompt and answers, got {self.prompt!r}, {self.answers!r}")
        if self.options and not set(self.answers) <= set(self.options):
            raise ValueError(
                f"example {self.id!r}: the answer {self.answers!r} is none of the options {self.options!r}"
            )


class Task(ABC):
    """Questions and their judgement.

    Attributes:
        name: what results are filed under.
        main: the metric of tables.
        new_tokens: how many the model may write.
        percent: whether the main metric is a share.
    """

    name: ClassVar[str]
    main: ClassVar[str]
    new_tokens: ClassVar[int] = 0
    percent: ClassVar[bool] = True

    @property
    @abstractmethod
    def protocols(self) -> dict[str, str]:
        """Every metric with its definition."""

    @abstractmethod
    def examples(self) -> list[Example]:
        """All questions, in the file's order.

        Raises:
            FileNotFoundError: where the task's file is not there.
            ValueError: where it is not of the right shape; it names the place.
        """

    @abstractmethod
    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        """What a model makes of each example: texts by what they are (`choice`, `text`)."""

    def check(self, editor: Editor) -> None:  # noqa: B027
        """Refuse an editor for whose models the task means nothing, once the examples are read.

        Raises:
            ValueError: with the reason.
        """

    @abstractmethod
    def judge(self, example: Example, answer: Answer) -> dict[str, Any]:
        """Metric -> value of one example, a number; a metric may be absent where it does not apply."""

    def aggregate(self, values: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, dict[str, Any]]:
        """Metric -> {value, ci, records} over examples, see `modules.metrics.summarise`."""
        return summarise([{"post": v} for v in values], seed, values=lambda post: post)


def drawn(task: Task, backbone: Backbone, count: int | None = None, seed: int = 0) -> tuple[list[Example], int]:
    """The examples that a model is asked, drawn by `seed` from those that fit its context window.

    What fits depends on the tokenizer and the window alone, so every editor of a backbone is asked the same. A smaller
    count is the beginning of a larger one.

    Args:
        count: how many; by default all.

    Returns:
        Examples whose head and shots are in the prompt, and how many were passed over because they are too long.

    Raises:
        ValueError: where none fits.
    """
    every = task.examples()
    order = random.Random(f"{seed}/{task.name}").sample(every, len(every))
    kept: list[Example] = []
    passed_over = 0
    for example in order:
        if count is not None and len(kept) == count:
            break
        whole = _fitted(example, backbone, task.new_tokens)
        passed_over += whole is None
        kept += [whole] if whole else []
    if not kept:
        raise ValueError(
            f"{task.name}: none of {len(every)} examples fits the context window of {backbone.config.source}"
        )
    return kept, passed_over


def _fitted(example: Example, backbone: Backbone, new_tokens: int) -> Example | None:
    """The example as one prompt with as many shots as fit, or None where it does not fit without any."""
    room = getattr(backbone.model.config, "max_position_embeddings", None)
    answer = max([new_tokens, *(len(encode(backbone.tokenizer, option).ids) for option in example.options)])
    for shots in range(len(example.shots), -1, -1):
        prompt = Asked(example.head + "".join(example.shots[:shots]), example.prompt)
        if not room or len(encode(backbone.tokenizer, prompt).ids) + answer <= room:
            return replace(example, prompt=prompt, head="", shots=())
    return None
