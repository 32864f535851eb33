"""Who runs the cells of a benchmark: this process, or several that each build the same."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from modules.backbone import Backbone
from modules.editor import Edited
from modules.evaluation import Answers
from trainers.benchmark.files import Files
from trainers.benchmark.grid import Cell
from trainers.benchmark.work import ELSEWHERE, TAKEN, Ended, attempt, in_worker
from trainers.editors import Chosen
from trainers.workers import Specs, spread

KILLED = "its process was killed (out of memory? fewer benchmark.workers leave more to each)"


@dataclass(frozen=True)
class Crew:
    """What it takes to run cells.

    Args:
        specs: what worker processes build backbone and editors from.
        backbone, editors: the same, in this process.
        files: where cells are kept.
        workers, answers: see `trainers.benchmark.grid.Benchmark`.
    """

    specs: Specs
    backbone: Backbone
    editors: Sequence[Chosen]
    files: Files
    workers: int
    answers: int

    def run(self, cells: Sequence[Cell], console: Console) -> None:
        """Run cells, keep each one's result in its file and say how it went."""
        columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(compact=True)
        ended = 0
        # a cell may take hours: speed is of all that was done, not of the last half minute
        options: dict[str, Any] = {"transient": True, "speed_estimate_period": math.inf}
        with Progress(*columns, console=console, disable=not console.is_terminal, **options) as shown:
            task = shown.add_task("", total=sum(map(_work, cells)))
            for cell, found in self._ended(cells, shown, task):
                ended += 1
                said = found.passed
                if found.result is not None:
                    kept = self.files.write(cell, self.backbone, found.result)
                    said = found.result.get("error") or ("" if kept else TAKEN)
                console.print(
                    f"[{ended}/{len(cells)}]{_clock(shown.tasks[0])} {cell.name}" + (f": {said}" if said else ""),
                    style="red" if said not in ("", ELSEWHERE) else "",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
        if ended < len(cells):
            console.print(
                f"{len(cells) - ended} cells are not run: after that error this process can use the GPU no more; give "
                "the command again",
                style="red",
                highlight=False,
            )

    def _ended(self, cells: Sequence[Cell], shown: Progress, task: TaskID) -> Iterator[tuple[Cell, Ended]]:
        """(cell, what became of it) as cells end; not all of them where this process can go on no more."""
        there_are = max(1, torch.cuda.device_count()) if self.specs.device == "auto" else 1
        workers = min(self.workers or there_are, max(1, len(cells)))
        if workers == 1:
            known = {c.editor.name: c.editor for c in self.editors}
            originals = Answers(Edited(self.backbone))
            for cell in cells:
                shown.update(task, description=cell.name)
                start = shown.tasks[0].completed
                tell = partial(shown.advance, task)
                ended = attempt(cell, known[cell.editor], self.backbone, originals, self.answers, self.files, tell)
                shown.update(task, completed=start + _work(cell))
                yield cell, ended
                if ended.broken:
                    return
            return
        shown.update(task, description=f"{workers} processes")
        work = partial(in_worker, answers=self.answers, files=self.files)
        for cell, ended in spread(work, cells, self.specs, workers, spent=lambda ended: ended.broken):
            shown.advance(task, _work(cell))
            yield cell, Ended({"error": KILLED}) if ended is None else ended


def _clock(task: Task) -> str:
    """What all cells so far took, and what the rest may take at that pace."""
    taken, done = task.elapsed or 0.0, task.completed
    return f" ({_span(taken)}" + (f", about {_span(taken * (task.remaining or 0) / done)} left)" if done else ")")


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _work(cell: Cell) -> int:
    """Records edited and evaluated."""
    if cell.mode in ("sequential", "consecutive"):
        return len(cell.records) + sum(cell.edits)
    return len(cell.records)
