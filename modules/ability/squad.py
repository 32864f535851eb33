"""Answers from a passage: EAC's prompt for open-domain QA where its passages are not at hand.

Data: SQuAD v1.1's JSON shape (Rajpurkar et al. 2016); by default the English part of XQuAD (Artetxe et al. 2020), which
is a part of SQuAD's development set.
Prompt and judgement: as `modules.ability.nq_open`, with the paragraph as the passage. SQuAD's paragraphs were chosen
first and hold every answer, Natural Questions' were retrieved, so figures of the two are not comparable.
"""

from dataclasses import dataclass
from typing import ClassVar

from datamodules.files import located
from datamodules.readers.base import load_keyed
from modules.ability.nq_open import NqOpen, asked
from modules.ability.task import Example


@dataclass
class Squad(NqOpen):
    """Answers from a passage."""

    path: str = "general/squad/xquad.en.json"

    name: ClassVar[str] = "squad"
    main: ClassVar[str] = "squad/exact_match"

    def examples(self) -> list[Example]:
        file = located(self.path)
        try:
            return [
                Example(qa["id"], asked(qa["question"], paragraph["context"]), tuple(a["text"] for a in qa["answers"]))
                for article in dict(load_keyed(file))["data"]
                for paragraph in article["paragraphs"]
                for qa in paragraph["qas"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{file} has not the shape of SQuAD v1.1: {error!r}") from error
