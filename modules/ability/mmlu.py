"""MMLU: multiple-choice questions of 57 subjects (Hendrycks et al. 2021, arXiv 2009.03300).

Data: a folder with dev/<subject>_dev.csv and test/<subject>_test.csv, of the columns question, four choices, answer;
the answer is a letter or a number from 0. With a header row or, as published, without.
Prompt: the authors' own, five solved questions of the subject's dev file; where they do not fit the context window, the
last ones are left out, as in the authors' code.
Judgement: the letter with the highest probability after "Answer:". The mean is over questions, not over subjects.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from datamodules.files import located
from modules.ability.choice import Choice
from modules.ability.files import comma_separated
from modules.ability.task import Example

_LETTERS = ("A", "B", "C", "D")


@dataclass
class Mmlu(Choice):
    """MMLU.

    Args:
        path: the folder.
        shots: solved questions before each.
        subjects: by the files' names; by default all that have a test file.

    Raises:
        ValueError: for a negative number of shots.
    """

    path: str = "general/mmlu"
    shots: int = 5
    subjects: list[str] | None = None

    name: ClassVar[str] = "mmlu"
    main: ClassVar[str] = "mmlu/accuracy"

    def __post_init__(self) -> None:
        if self.shots < 0:
            raise ValueError(f"mmlu: shots must not be negative, got {self.shots}")

    def examples(self) -> list[Example]:
        folder = located(self.path)
        there = sorted(file.name.removesuffix("_test.csv") for file in (folder / "test").glob("*_test.csv"))
        if not there:
            raise FileNotFoundError(f"no test/<subject>_test.csv in {folder}")
        unknown = sorted(set(self.subjects or ()) - set(there))
        if unknown:
            raise ValueError(f"mmlu: no subject {unknown[0]!r} in {folder}; there are: {', '.join(there)}")
        return [example for subject in self.subjects or there for example in self._of(folder, subject)]

    def _of(self, folder: Path, subject: str) -> list[Example]:
        solved = _rows(located(str(folder / "dev" / f"{subject}_dev.csv"))) if self.shots else []
        if len(solved) < self.shots:
            raise ValueError(f"mmlu: {subject} has {len(solved)} solved questions, {self.shots} shots are wanted")
        shots = tuple(f"{_asked(row)} {row[-1]}\n\n" for row in solved[: self.shots])
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        return [
            Example(f"{subject}/{i}", _asked(row), (row[-1],), _LETTERS, head, shots)
            for i, row in enumerate(_rows(folder / "test" / f"{subject}_test.csv"))
        ]


def _rows(file: Path) -> list[list[str]]:
    """Question, four choices and the letter of the answer, a row each."""
    rows = comma_separated(file)
    rows = rows[1:] if rows and rows[0][0] == "question" else rows
    found = []
    for number, row in enumerate(rows):
        letters = {str(i): letter for i, letter in enumerate(_LETTERS)} | {letter: letter for letter in _LETTERS}
        if len(row) != 6 or row[5].strip() not in letters:
            raise ValueError(f"{file}, question {number}: needs question, four choices and an answer 0-3 or A-D: {row}")
        found.append([*row[:5], letters[row[5].strip()]])
    return found


def _asked(row: list[str]) -> str:
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(_LETTERS, row[1:5], strict=True))
    return f"{row[0]}{choices}\nAnswer:"
