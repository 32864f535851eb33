"""Sentiment: is a snippet of a film review positive or negative?

Data: SST-2 of GLUE (Socher et al. 2013), a tab-separated file text, label; label 1 is positive.
Prompt: EAC, appendix C.4, table 4; the released code writes it without the spaces after the comma and the first full
stop.
Judgement: two-way, " positive" against " negative" by probability. The released code writes one token instead
(`released`), which can hold the word only where the tokenizer has it whole.
"""

from dataclasses import dataclass
from typing import ClassVar

from datamodules.files import located
from modules.ability.choice import TwoWay
from modules.ability.files import tsv
from modules.ability.task import Example

_ANSWERS = {"1": "positive", "0": "negative"}
_PROMPT = (
    "For each snippet of text, label the sentiment of the text as positive or negative. The answer should be exact "
    "'positive' or 'negative'. text: {} answer:"
)


@dataclass
class Sst2(TwoWay):
    """EAC's sentiment task."""

    path: str = "general/sst2/dev.tsv"

    name: ClassVar[str] = "sst2"
    main: ClassVar[str] = "sst2/accuracy"

    def examples(self) -> list[Example]:
        found = []
        file = located(self.path)
        for index, (text, label) in enumerate(tsv(file, 2)):
            if label not in _ANSWERS:
                raise ValueError(f"{file}, row {index}: label {label!r} is none of {', '.join(_ANSWERS)}")
            prompt = _PROMPT.format(text.strip())
            found.append(Example(str(index), prompt, (_ANSWERS[label],), tuple(_ANSWERS.values())))
        return found
