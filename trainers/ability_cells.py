"""The results of `trainers.ability`: {"meta", "cells"}, cells by editor, by number of edits (as text) and by task.

A cell holds what `modules.ability.measure` gives, `change` from the unedited model, `edit_seconds`, `passed_over`
(examples too long for the model), `made_of`, a hash of everything that its figures hang on, and `files`, hashes of the
files that the editor was made of; or {"error": reason}. By these a later call tells which cells it may keep, so that
tasks, editors and numbers of edits can be added. What a call does not ask for is not in its file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from datamodules.files import hashes
from datamodules.records import EditRecord
from modules.ability.measure import change
from modules.ability.task import Example, Task
from trainers.report import Report

UNEDITED = "unedited"


@dataclass(frozen=True)
class Asked:
    """A task with the examples that are asked of it, and how many were too long for the model."""

    task: Task
    examples: list[Example]
    passed_over: int


class State(NamedTuple):
    """A model that is asked: an editor's, after so many edits.

    Args:
        editor: its name.
        facts: what it was made of, see `trainers.editors.Chosen`.
    """

    editor: str
    edits: int
    facts: dict[str, Any]


class Cells:
    """The cells of a report.

    Args:
        report: is written to.
        states: all models that are asked.
        asked: all tasks.
        records: that are edited.
        rest: what all cells hang on besides, as JSON values: weights, batch, seed.
    """

    def __init__(
        self,
        report: Report,
        states: Sequence[State],
        asked: Sequence[Asked],
        records: Sequence[EditRecord],
        rest: Sequence[Any],
    ) -> None:
        self.report, self.states, self.asked, self.rest = report, list(states), list(asked), list(rest)
        self._records = [record.to_json() for record in records]
        self._files = {state.editor: hashes(state.facts) for state in self.states}
        self._tasks = {a.task.name: _digest([_kind(a.task), [asdict(e) for e in a.examples]]) for a in asked}

    def made_of(self, state: State, task: str) -> str:
        """A hash of what a cell's figures hang on. The unedited model hangs on no records."""
        edits = [self._records[: state.edits], state.facts] if state.edits else []
        return _digest([self._tasks[task], edits, self.rest])

    def files(self, state: State) -> dict[str, str]:
        """Hashes of the files that an editor was made of; cells of before do not tell them."""
        return self._files[state.editor]

    def keep(self, out: Path) -> int:
        """Take over the cells of an earlier file that are made of the same; how many those are."""
        try:
            old = json.loads(out.read_text(encoding="utf-8"))["cells"]
            found = [
                (state, one.task.name, cell)
                for state in self.states
                for one in self.asked
                if (cell := old.get(state.editor, {}).get(str(state.edits), {}).get(one.task.name, {}))
                and cell.get("made_of") == self.made_of(state, one.task.name)
                and cell.get("files", self.files(state)) == self.files(state)
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is no file, or one of another kind
            return 0
        for state, task, cell in found:
            self.put(state, task, cell)
        return len(found)

    def left(self, state: State) -> list[Asked]:
        """The tasks that this model has not been asked."""
        there = self.report["cells"].get(state.editor, {}).get(str(state.edits), {})
        return [one for one in self.asked if one.task.name not in there]

    def put(self, state: State, task: str, cell: dict[str, Any]) -> None:
        self.report["cells"].setdefault(state.editor, {}).setdefault(str(state.edits), {})[task] = cell

    def compare(self, seed: int) -> None:
        """Give every cell its change from the unedited model, where that was asked."""
        before = self.report["cells"].get(UNEDITED, {}).get("0", {})
        for editor, by_count in self.report["cells"].items():
            for cells in by_count.values() if editor != UNEDITED else ():
                for task, cell in cells.items():
                    if "metrics" in cell and "metrics" in before.get(task, {}):
                        cell["change"] = change(before[task], cell, seed)


def _kind(task: Task) -> list[Any]:
    return [
        type(task).__qualname__,
        {k: v for k, v in vars(task).items() if k != "path" and not k.startswith("_")},
    ]  # its examples say what it held


def _digest(values: Any) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
