"""Open-domain question answering on Natural Questions (Kwiatkowski et al. 2019; the open split of Lee et al. 2019).

Data: JSON Lines with `question` and `answer` (a list); `output`, a list of passages, where the file has them, as the
file of EAC and Model-Editing-Hurt does and Google's own does not.
Prompt: with a passage EAC's, appendix C.4, table 4. Without one there is nothing published: the same words without the
passage, and "Answer:" at the end, because a base model would go on with the question. The two are not comparable;
results hold the prompts.
Judgement: exact match after SQuAD's normalisation, by this project's rule (the greedy text equals an answer or begins
with one in whole words, since a base model does not stop after it), and the weaker `span_match`.

The released code counts an answer anywhere, and divides by 3,610 however many questions are asked. It also reads the
prompt as part of the answer unless the model writes "Answer:", so that an answer that stands in the passage counts;
counts a question once for every single word that matches; and after the first match of several words tries no more than
the spans from a text's first word. Only the first two are offered (`released`); the others are mistakes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from datamodules.files import located
from datamodules.readers.base import load_rows
from modules.ability.task import Answer, Example, Task
from modules.editor import Edited
from modules.metrics import exact_match, normalise

RELEASED_QUESTIONS = 3610


@dataclass
class NqOpen(Task):
    """EAC's open-domain QA task.

    Args:
        path: its file.
        released: add the released code's figure, see above.
    """

    path: str = "general/nq_open/NQ-open.dev.jsonl"
    released: bool = False

    name: ClassVar[str] = "nq_open"
    main: ClassVar[str] = "nq_open/exact_match"
    new_tokens: ClassVar[int] = 20

    @property
    def protocols(self) -> dict[str, str]:
        found = {
            f"{self.name}/exact_match": "Share of questions whose greedy continuation of 20 tokens, in lower case and "
            "without punctuation and articles, equals or begins with an answer, in whole words.",
            f"{self.name}/span_match": "Share of questions whose continuation holds an answer, in whole words.",
        }
        if self.released:
            found[f"{self.name}/span_match_of_3610"] = (
                "Questions whose continuation holds an answer anywhere, divided by 3,610: a share only where all are "
                "asked."
            )
        return found

    def examples(self) -> list[Example]:
        found = []
        file = located(self.path)
        for index, row in enumerate(load_rows(file)):
            try:
                passages = row.get("output") or [""]
                found.append(Example(str(index), asked(row["question"], passages[0]), tuple(row["answer"])))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, record {index}: needs `question` and `answer`, a list: {error!r}") from error
        return found

    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        texts = edited.generate([e.prompt for e in examples], max_new_tokens=self.new_tokens, batch_size=batch_size)
        return [{"text": text} for text in texts]

    def judge(self, example: Example, answer: Answer) -> dict[str, float]:
        return {
            f"{self.name}/exact_match": float(exact_match(answer["text"], example.answers)),
            f"{self.name}/span_match": float(span_match(answer["text"], example.answers)),
        }

    def aggregate(self, values: Sequence[Mapping[str, float]], seed: int = 0) -> dict[str, dict[str, Any]]:
        found = super().aggregate(values, seed)
        if self.released and (span := found.get(f"{self.name}/span_match")):
            share = span["records"] / RELEASED_QUESTIONS
            scaled = {"value": span["value"] * share, "ci": [end * share for end in span["ci"]]}
            found[f"{self.name}/span_match_of_3610"] = span | scaled
        return found


def asked(question: str, passage: str = "") -> str:
    """EAC's prompt, and ours where there is no passage."""
    if passage:
        return f"Refer to the passage below and answer the following question. Passage: {passage} Question: {question}"
    return f"Answer the following question. Question: {question} Answer:"


def span_match(text: str, answers: Sequence[str]) -> bool:
    """Whether a text holds one of the answers, in whole words after `modules.metrics.normalise`."""
    words = normalise(text)
    wanted = [w for w in map(normalise, answers) if w]
    return any(words[at : at + len(w)] == w for w in wanted for at in range(len(words) - len(w) + 1))
