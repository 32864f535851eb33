"""Results of general ability that an earlier call has left: what a later one takes over from its file."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from trainers import earlier
from trainers.ability_cells import Cells
from trainers.report import Report


def go_on(cells: Cells, out: Path, console: Console) -> None:
    """Put the results of an earlier file into the cells, but for failures that this call tries again.

    Raises:
        ValueError: for a file that must not be written over, see `trainers.earlier`.
    """
    report = cells.report
    old = earlier.read(out, report["meta"]["setup"], cells.made_of)
    if old is None:
        return
    earlier.refuse(out, _differing(report["meta"], old["meta"]))
    counts, codes = {True: 0, False: 0}, []
    for editor, edits, task, cell in _every(old):
        asked = cells.asks(editor, edits, task)
        if "error" not in cell:
            counts[asked] += 1
            codes.append(cell.get("code"))
        elif asked:
            continue
        report["cells"].setdefault(editor, {}).setdefault(edits, {})[task] = cell
    report["made_of"] |= old["made_of"]
    _add(report["meta"], old["meta"])
    report["meta"]["earlier"] = earlier.calls(old)
    kept, besides = ([f"{counts[asked]} results"] if counts[asked] else [] for asked in (True, False))
    earlier.tell(console, out, kept, besides, codes)


def _differing(now: Mapping[str, Any], was: Mapping[str, Any]) -> list[str]:
    """What is not the same of that which both have: tasks, and the records that are edited first."""
    both = min(len(now["edited"]), len(was["edited"]))
    tasks = [name for name in now["tasks"] if name in was["tasks"]]
    differing = [name for name in tasks if now["tasks"][name]["hash"] != was["tasks"][name]["hash"]]
    return [f"examples of {name}" for name in differing] + ["records"] * (now["edited"][:both] != was["edited"][:both])


def _add(now: dict[str, Any], was: Mapping[str, Any]) -> None:
    """What an earlier call's `meta` has more than this one's."""
    for name in ("tasks", "protocols"):
        now[name] = was[name] | now[name]
    now["left_out"] = {name: why for name, why in now["left_out"].items() if name not in now["tasks"]}
    now["edited_after"] = sorted({*now["edited_after"], *was["edited_after"]})
    if len(was["edited"]) > len(now["edited"]):
        now |= {name: was[name] for name in ("edited", "records", "edits")}


def _every(report: Report) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """(editor, number of edits, task, cell) of all cells."""
    for editor, by_count in report["cells"].items():
        for edits, by_task in by_count.items():
            for task, cell in by_task.items():
                yield editor, edits, task, cell
