"""Summaries of chats, by their overlap with a person's.

Data: SAMSum (Gliwa et al. 2019), a JSON array of `id`, `dialogue`, `summary`. Its licence, CC BY-NC-ND 4.0, lets nobody
ship it with a program: get the file yourself, or go without the task.
Prompt: EAC, appendix C.4, table 4; the released code has a line break before "TL;DR:" (`released`).
Judgement: the mean of ROUGE-1, ROUGE-2 and ROUGE-L (Lin 2004), F1, of a greedy continuation of 25 tokens, by
torchmetrics without stemming. The released code takes the package `rouge`, which counts an n-gram once however often it
occurs, and cuts the last 13 characters off every text, the length of GPT-2's "<|endoftext|>", whether it stands there
or not. Neither is imitated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torchmetrics.functional.text.rouge import rouge_score

from datamodules.files import located
from datamodules.readers.base import load_rows
from modules.ability.task import Answer, Example, Task
from modules.editor import Edited

_ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass
class Samsum(Task):
    """EAC's summarization task.

    Args:
        path: its file.
        released: the released code's prompt, see above.
    """

    path: str = "general/samsum/test-summarization.json.gz"
    released: bool = False

    name: ClassVar[str] = "samsum"
    main: ClassVar[str] = "samsum/rouge"
    new_tokens: ClassVar[int] = 25

    @property
    def protocols(self) -> dict[str, str]:
        what = "F1 of a greedy continuation of 25 tokens against the reference summary, lower case, no stemming."
        each = {f"samsum/{key}": f"ROUGE-{key.removeprefix('rouge')} {what}" for key in _ROUGE}
        return {self.main: "The mean of ROUGE-1, ROUGE-2 and ROUGE-L of an example."} | each

    def examples(self) -> list[Example]:
        found = []
        file = located(self.path)
        for index, row in enumerate(load_rows(file)):
            try:
                prompt = row["dialogue"] + ("\nTL;DR:" if self.released else " TL;DR:")
                found.append(Example(str(row.get("id", index)), prompt, (row["summary"],)))
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{file}, record {index}: needs `dialogue` and `summary`: {error!r}") from error
        return found

    def answers(self, edited: Edited, examples: Sequence[Example], batch_size: int) -> list[Answer]:
        texts = edited.generate([e.prompt for e in examples], max_new_tokens=self.new_tokens, batch_size=batch_size)
        return [{"text": text} for text in texts]

    def judge(self, example: Example, answer: Answer) -> dict[str, float]:
        scores = rouge_score(answer["text"], example.answers[0], rouge_keys=_ROUGE)
        each = {f"samsum/{key}": float(scores[f"{key}_fmeasure"]) for key in _ROUGE}
        return {self.main: sum(each.values()) / len(each)} | each
