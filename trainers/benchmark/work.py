"""What a process of a benchmark does with a cell that it takes, and how it tells what became of it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers
from trainers.benchmark.cell import in_words, run_cell
from trainers.benchmark.files import UNFINISHED, Files
from trainers.benchmark.grid import Cell
from trainers.provenance import hardware
from trainers.workers import built

log = logging.getLogger(__name__)
ELSEWHERE = "finished meanwhile, by another command"
TAKEN = "not kept: its file is by now a finished one of another setting; give another benchmark.out"


@dataclass(frozen=True)
class Ended:
    """What became of a cell.

    Args:
        result: to be written; None where the cell was passed over.
        passed: why it was.
        broken: whether the process can compute nothing more, see `usable`.
    """

    result: dict[str, Any] | None
    passed: str = ""
    broken: bool = False


def attempt(
    cell: Cell,
    editor: Editor,
    backbone: Backbone,
    originals: Answers,
    answers: int,
    files: Files,
    tell: Callable[[int], None],
) -> Ended:
    """Run a cell, unless another command has finished it since the grid was planned. No failure of it is raised.

    Args:
        originals, tell: see `trainers.benchmark.cell.run_cell`.
        answers: of so many records, generated answers are kept.
        files: where the cell is kept so far as it is.
    """
    there = files.there(cell)
    if there is not None and "error" not in there:
        return Ended(None, ELSEWHERE if cell.holds(there) else TAKEN)
    on = {"hardware": hardware(backbone.device)}  # of this process, which may be a worker; asked while it can be

    def keep(found: dict[str, Any]) -> None:
        files.write(cell, backbone, found | on | {"error": UNFINISHED})

    try:
        return Ended(run_cell(cell, editor, backbone, originals, answers, tell, keep) | on)
    except Exception as error:  # whatever one cell does, the others' hours of work go on
        log.debug("%s failed", cell.name, exc_info=True)
        return Ended(in_words(error) | on, broken=not usable(backbone.device))


def usable(device: torch.device) -> bool:
    """Whether this process can go on computing there: an illegal access or a failed assertion on a GPU ends all of its
    work on every GPU, and each later cell would fail at once for no reason of its own."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


_originals: list[Answers] = []  # of a worker process: the unedited model is asked each question once


def in_worker(cell: Cell, answers: int, files: Files) -> Ended:
    """`attempt` in a process of `trainers.workers.spread`."""
    backbone, known = built()
    if not _originals:
        _originals.append(Answers(Edited(backbone)))
    return attempt(cell, known[cell.editor], backbone, _originals[0], answers, files, lambda _: None)
