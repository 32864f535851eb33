"""Textual entailment: does the second sentence follow from the first?

Data: RTE of GLUE (Dagan et al. 2005, Wang et al. 2019), a tab-separated file index, sentence1, sentence2, label. The
file that EAC and Model-Editing-Hurt (Gu et al. 2024) use, test-NLI.tsv, holds GLUE's *training* rows: a model that saw
GLUE in training has seen them.
Prompt: EAC, appendix C.4, table 4.
Judgement: two-way, " True" against " False" by probability. The released code writes one token instead (`released`).
"""

from dataclasses import dataclass
from typing import ClassVar

from datamodules.files import located
from modules.ability.choice import TwoWay
from modules.ability.files import tsv
from modules.ability.task import Example

_ANSWERS = {"entailment": "True", "not_entailment": "False"}


@dataclass
class Rte(TwoWay):
    """EAC's NLI task."""

    path: str = "general/rte/test-NLI.tsv.gz"

    name: ClassVar[str] = "rte"
    main: ClassVar[str] = "rte/accuracy"

    def examples(self) -> list[Example]:
        found = []
        file = located(self.path)
        for index, first, second, label in tsv(file, 4):
            if label not in _ANSWERS:
                raise ValueError(f"{file}, row {index}: label {label!r} is none of {', '.join(_ANSWERS)}")
            prompt = f"{first} entails the {second}. True or False? answer:"
            found.append(Example(index, prompt, (_ANSWERS[label],), tuple(_ANSWERS.values())))
        return found
