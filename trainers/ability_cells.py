"""The results of `trainers.ability`: {"meta", "made_of", "cells"}, cells by editor, by number of edits (as text) and by
task.

A cell holds what `modules.ability.measure` gives, `change` from the unedited model, `edit_seconds`, `passed_over`
(examples too long for the model) and `code`, a hash of the code that computed it; or {"error": reason}. A later call
may add tasks, editors and numbers of edits (trainers/earlier.py). It must ask the same examples of a task that the file
has, whose hash is in `meta.tasks`, and edit the same records first, of each of which `meta.edited` has a hash.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from datamodules.records import EditRecord
from modules.ability.measure import change
from modules.ability.task import Example, Task
from trainers.made_of import digest, of_facts
from trainers.report import Report
from trainers.result_cache import code

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
        report: is written to; its `meta` has the tasks.
        states: all models that are asked.
        asked: all tasks.
        records: that are edited.
        setup: what all cells hang on besides, by name: weights, batch, seed.

    Attributes:
        made_of: by editor, what it was made of (`trainers.made_of.of_facts`).
    """

    def __init__(
        self,
        report: Report,
        states: Sequence[State],
        asked: Sequence[Asked],
        records: Sequence[EditRecord],
        setup: Mapping[str, Any],
    ) -> None:
        self.report, self.states, self.asked = report, list(states), list(asked)
        self.made_of = {state.editor: of_facts(state.facts) for state in self.states}
        meta = report["meta"]
        meta |= {"setup": dict(setup), "edited": [digest(record.to_json()) for record in records]}
        for one in self.asked:
            meta["tasks"][one.task.name]["hash"] = digest([_kind(one.task), [asdict(e) for e in one.examples]])

    def left(self, state: State) -> list[Asked]:
        """The tasks that this model has not been asked."""
        there = self.report["cells"].get(state.editor, {}).get(str(state.edits), {})
        return [one for one in self.asked if one.task.name not in there]

    def asks(self, editor: str, edits: str, task: str) -> bool:
        """Whether this call asks for a cell."""
        states = ((state.editor, str(state.edits)) for state in self.states)
        return (editor, edits) in states and task in (one.task.name for one in self.asked)

    def put(self, state: State, task: str, cell: dict[str, Any]) -> None:
        """Put in what was found, or why nothing was."""
        there = self.report["cells"].setdefault(state.editor, {}).setdefault(str(state.edits), {})
        there[task] = cell
        if "error" not in cell:
            there[task] = cell | {"code": code()}
            self.report["made_of"][state.editor] = self.made_of[state.editor]

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
