"""Put tasks to the unedited model and to every editor's: a progress bar, a JSON file that a later call adds to."""

import logging
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from datamodules.files import located
from datamodules.records import EditRecord
from modules.ability.measure import measure
from modules.ability.states import check, edited_models
from modules.ability.task import Task, drawn
from modules.backbone import Backbone
from modules.editor import Edited
from trainers.ability_cells import UNEDITED, Asked, Cells, State
from trainers.ability_earlier import go_on
from trainers.ability_table import markdown, print_ability
from trainers.editors import Chosen
from trainers.made_of import of_model
from trainers.progress import bar
from trainers.report import Report, new_report
from trainers.written import write_json, write_text

log = logging.getLogger(__name__)


def run_ability(
    tasks: Sequence[Task],
    editors: Sequence[Chosen],
    backbone: Backbone,
    records: Sequence[EditRecord],
    counts: Sequence[int],
    batch: int | None,
    examples: int | None,
    out: Path,
    progress: bool = True,
    data: str = "",
    seed: int = 0,
    batch_size: int = 8,
    console: Console | None = None,
) -> Report:
    """Ask the unedited model (where 0 is among the counts), then every editor's after each number of edits.

    The file is written anew after each task, and a later call of the same setup goes on from it and adds to it
    (`trainers.earlier`). What fails is marked with the reason, and tried again by a later call.

    Args:
        counts: numbers of records, ascending; 0 is the unedited model.
        batch: see `modules.ability.states.edited_models`.
        examples: of each task; None: all.
        data, seed: see `trainers.report.new_report`.

    Raises:
        ValueError: for two tasks or editors of one name, no task whose file is there, an editor called unedited, or a
            file of another setup; and see `modules.ability.states.check` and `modules.ability.task.Task.check`.
    """
    check_tasks(tasks)
    edits = [count for count in counts if count]
    for chosen in editors:
        check(chosen.editor, len(records), edits, batch)
    names = [*(["the unedited model"] if 0 in counts else []), *(c.editor.name for c in editors)]
    if UNEDITED in names or len(set(names)) < len(names):
        raise ValueError(f"editors need different names, and unedited is 0 edits (--edits 0); got {', '.join(names)}")
    console = console or Console()
    asked, missing = _asked(tasks, backbone, examples, seed, console)
    for chosen in editors:
        for one in asked:
            one.task.check(chosen.editor)
    states = [State(UNEDITED, 0, {})] if 0 in counts else []
    states += [State(c.editor.name, count, c.facts) for c in editors for count in edits]
    report = _new(backbone, records, counts, batch, asked, missing, data, seed)
    cells = Cells(report, states, asked, records, of_model(backbone) | {"batch": batch, "seed": seed})
    go_on(cells, out, console)
    with bar(console, enabled=progress) as shown:
        asking = _Asking(cells, out, batch_size, seed, shown)
        if 0 in counts:
            asking.ask(Edited(backbone), states[0], 0.0)
        for chosen in editors:
            asking.edit_and_ask(chosen, backbone, records, batch)
    cells.compare(seed)
    write_json(out, report)
    write_text(out.with_suffix(".md"), markdown(report))
    print_ability(report, console)
    console.print(f"written to {out} and {out.with_suffix('.md')}", highlight=False, soft_wrap=True)
    return report


class _Asking:
    """Fills the cells that are missing, and tells the progress bar."""

    def __init__(self, cells: Cells, out: Path, batch_size: int, seed: int, shown: Progress) -> None:
        self.cells, self.out, self.batch_size, self.seed, self.shown = cells, out, batch_size, seed, shown
        work = sum(len(one.examples) for state in cells.states for one in cells.left(state))
        self.line = shown.add_task("", total=work)

    def ask(self, edited: Edited, state: State, edit_seconds: float) -> None:
        """Put the tasks that are left to a model."""
        for one in self.cells.left(state):
            name = one.task.name
            self.shown.update(self.line, description=f"{state.editor}, {state.edits} edits: {name}")
            try:
                found = measure(edited, one.task, one.examples, self.batch_size, self.seed, self._advance)
            except Exception as error:  # whatever one task does, the others' hours of work go on
                self._failed(state, [one], error)
            else:
                about = {"passed_over": one.passed_over, "edit_seconds": edit_seconds}
                self.cells.put(state, name, found | about)
            write_json(self.out, self.cells.report)

    def edit_and_ask(
        self, chosen: Chosen, backbone: Backbone, records: Sequence[EditRecord], batch: int | None
    ) -> None:
        """Make one editor's models that have tasks left, and ask them."""
        name = chosen.editor.name
        states = {s.edits: s for s in self.cells.states if s.editor == name and self.cells.left(s)}
        counts = list(states)
        for some in [[c] for c in counts] if batch is None else [counts]:  # one call each: the others may still succeed
            self.shown.update(self.line, description=f"{name}: editing")
            try:
                with closing(edited_models(chosen.editor, backbone, records, some, batch)) as models:
                    for count, edited, seconds in models:
                        self.ask(edited, states[count], seconds)
                        self.shown.update(self.line, description=f"{name}: editing")
            except Exception as error:
                for state in (states[count] for count in some):
                    self._failed(state, self.cells.left(state), error)
                write_json(self.out, self.cells.report)

    def _advance(self, count: int) -> None:
        self.shown.advance(self.line, count)

    def _failed(self, state: State, asked: Sequence[Asked], error: Exception) -> None:
        log.debug("%s failed after %d edits", state.editor, state.edits, exc_info=error)
        for one in asked:
            self.cells.put(state, one.task.name, {"error": f"{type(error).__name__}: {error}"})


def check_tasks(tasks: Sequence[Task]) -> None:
    """Refuse tasks that cannot be asked, before a model is there.

    Raises:
        ValueError: for two of one name, and where the file of none is there.
    """
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        raise ValueError(f"tasks need different names, since results are filed by name; got {', '.join(names)}")
    missing = []
    for path in filter(None, (getattr(task, "path", None) for task in tasks)):  # lm-eval's have none
        try:
            located(path)
        except FileNotFoundError as error:
            missing.append(str(error))
    _refuse_without(len(tasks) - len(missing), missing)


def _refuse_without(tasks: int, missing: Sequence[str]) -> None:
    if not tasks:
        raise ValueError(f"none of the tasks has its file: {'; '.join(missing) or 'no task was named'}")


def _asked(
    tasks: Sequence[Task], backbone: Backbone, examples: int | None, seed: int, console: Console
) -> tuple[list[Asked], dict[str, str]]:
    """The tasks whose files are there, and why the others are left out."""
    asked, missing = [], {}
    for task in tasks:
        try:
            asked.append(Asked(task, *drawn(task, backbone, examples, seed)))
        except FileNotFoundError as error:
            missing[task.name] = str(error)
            console.print(f"left out: {task.name}, {error}", highlight=False, soft_wrap=True)
    _refuse_without(len(asked), list(missing.values()))
    return asked, missing


def _new(
    backbone: Backbone,
    records: Sequence[EditRecord],
    counts: Sequence[int],
    batch: int | None,
    asked: Sequence[Asked],
    missing: dict[str, str],
    data: str,
    seed: int,
) -> Report:
    protocols = {name: text for one in asked for name, text in one.task.protocols.items()}
    mode = "batch" if batch is None else "sequential" if batch == 1 else "consecutive"
    report = new_report(backbone, records, counts, data, seed, protocols=protocols, mode=mode, protocol="ability")
    meta: dict[str, Any] = report["meta"]
    meta["edited_after"] = meta.pop("pool_sizes")
    del meta["queries_per_kind"]  # the records' own questions are not asked
    tasks = {
        one.task.name: {"main": one.task.main, "percent": one.task.percent, "examples": len(one.examples)}
        for one in asked
    }
    return {"meta": meta | {"batch": batch, "tasks": tasks, "left_out": missing}, "made_of": {}, "cells": {}}
