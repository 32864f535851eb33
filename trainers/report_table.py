"""A report as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modules.counterfact import COUNTERFACT
from modules.fluency import CONSISTENCY, FLUENCY
from modules.metrics import from_file
from modules.zsre import ZSRE
from trainers.columns import (
    COLUMNS,
    CONSISTENCY_LEGEND,
    COSTS,
    COSTS_LEGEND,
    COUNTERFACT_LEGEND,
    CRITERIA,
    DUNE_LEGEND,
    EXACT_LEGEND,
    FLUENCY_LEGEND,
    LEGEND,
    MQUAKE_LEGEND,
    NO_REFERENCES,
    UNIEDIT_LEGEND,
    UNRANKED,
    ZSRE_LEGEND,
)
from trainers.report import Report, cells, failures


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the table, its legend and the failures. Where the output is no terminal, rich leaves out all styling."""
    console = console or Console()
    for columns in _tables(report):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("Editor", overflow="fold")
        table.add_column("Pool", justify="right", no_wrap=True)
        for _, title in columns:
            table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
        for editor, size, values in _rows(report, columns):
            table.add_row(editor, str(size), *(Text(text, style="bold" if best else "") for text, best in values))
        console.print(table)
    console.print(_legend(report), style="dim", highlight=False)
    for note in left_out(report) + contradictions(report["runs"]):
        console.print(note, highlight=False)
    for editor, size, reason in failures(report):
        console.print(Text(f"{editor} failed with pools of {size}: {reason}", style="red"))


def left_out(report: Report) -> list[str]:
    """What records a reader might take to be in the table and are not: a line each for those that were not drawn, those
    that are in no pool (`--singles`, or a last pool that is not full) and those that are edited and not asked."""
    meta = report["meta"]
    records, available = meta.get("records", 0), meta.get("records_available", 0)
    runs = [(int(size), run) for sizes in report["runs"].values() for size, run in sizes.items()]
    taken = {size: run["pools"] * size for size, run in runs if "pools" in run}  # modes that go on have none
    fewer = [f"pools of {size} take {count:,}" for size, count in sorted(taken.items()) if count < records]
    asked = {n for size, run in runs if (n := run.get("asked_of_each_pool", size)) < size}
    return (
        ([f"{records:,} of {available:,} records are drawn."] if records < available else [])
        + ([f"Of these {records:,} records {', '.join(fewer)}."] if fewer else [])
        + [f"Of each pool the first {n:,} records are asked." for n in sorted(asked)]
    )


def contradictions(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """How many cases contradict one another, and what is not asked of them, a line for each number of edits; likewise
    how many edits conflict.

    Args:
        runs: settings by editor and then by the number of records edited together, as a report's.
    """
    found: dict[int, tuple[int, int, bool]] = {}
    edited = {size: max(_edited(of[size]) for of in runs.values() if size in of) for of in runs.values() for size in of}
    conflicts: dict[int, tuple[int, int]] = {}
    for sizes in runs.values():
        for size, run in sizes.items():
            if against := run.get("records_contradicted"):
                whole = run.get("protocol") == "mquake" and not run.get("conflicts")
                found[int(size)] = against, edited[size], whole
            if count := run.get("conflicting_edits"):
                conflicts[int(size)] = count, edited[size]
    return [
        f"{against} of {count} cases, {size} edited together, rest on a fact that another one's edit changes: "
        + ("they are not asked." if whole else "their multi-hop questions are not asked.")
        for size, (against, count, whole) in sorted(found.items())
    ] + [
        f"{count} of {edited} records, {size} edited together, edit a prompt that another one edits to something else: "
        "at most one of these edits can hold."
        for size, (count, edited) in sorted(conflicts.items())
    ]


def _edited(run: Mapping[str, Any]) -> int:
    """How many records were edited; an upper bound edits those alone that it asks. Files of before this was counted
    have the records asked."""
    whole = run.get("protocol") == "mquake" and not run.get("conflicts")
    asked = run.get("records", 0) + (run.get("records_contradicted", 0) if whole else 0)
    return run.get("edited", asked)


def _rows(report: Report, columns: Sequence[tuple[str, str]]) -> list[tuple[str, int, list[tuple[str, bool]]]]:
    """(editor, pool size, [(text, is the best at this pool size)]) in the report's order."""
    best: dict[tuple[int, str], float] = {}
    for editor, size, cell in cells(report):
        for metric, _ in columns:
            if metric in cell and metric not in UNRANKED and not _is_reference(report, editor, size):
                value = round(from_file(cell[metric]["value"]), 3)  # as shown: equal figures are equally good
                best[size, metric] = max(best.get((size, metric), 0.0), value)  # the first, where the second is NaN
    digits = {key: places for key, _, places in COSTS}
    rows = []
    for editor, size, cell in cells(report):
        values: list[tuple[str, bool]] = []
        run = report["runs"].get(editor, {}).get(str(size), {})
        for metric, _ in columns:
            if metric in digits:
                values.append((f"{run[metric]:.{digits[metric]}f}" if metric in run else "-", False))
                continue
            value = round(from_file(cell[metric]["value"]), 3) if metric in cell else None
            top = bool(value) and value == best.get((size, metric)) and not _is_reference(report, editor, size)
            values.append(("-", False) if value is None else (f"{100 * value:.1f}", top))
        rows.append((editor, size, values))
    return rows


def _is_reference(report: Report, editor: str, size: int) -> bool:
    """The unedited model and upper bounds are there to compare with, not to win."""
    return editor == "unedited" or report["runs"].get(editor, {}).get(str(size), {}).get("own_edit_only", False)


def _tables(report: Report) -> list[list[tuple[str, str]]]:
    """The columns (metric, title) of the table, and of UniEdit's table of criteria where there is one."""
    present = {metric for _, _, cell in cells(report) for metric in cell}
    exact = any(metric.endswith("/exact_match") for metric in present)
    main = [(metric, short if exact else title) for metric, title, short in COLUMNS if metric in present]
    criteria = [(metric, title) for metric, title in CRITERIA if metric in present]
    if any(metric in (COUNTERFACT.score, ZSRE.score) for metric, _ in main):
        told = {key for sizes in report["runs"].values() for run in sizes.values() for key in run}
        main += [(key, title) for key, title, _ in COSTS if key in told]
    return [main, criteria] if criteria else [main]


def _legend(report: Report) -> str:
    metrics = [metric for columns in _tables(report) for metric, _ in columns]
    if any("/uniedit_top_" in metric for metric in metrics):
        return UNIEDIT_LEGEND
    if COUNTERFACT.score in metrics:
        about_rs = CONSISTENCY_LEGEND if CONSISTENCY in metrics else NO_REFERENCES
        return COUNTERFACT_LEGEND + COSTS_LEGEND + (FLUENCY_LEGEND + about_rs if FLUENCY in metrics else "")
    if ZSRE.score in metrics:
        return ZSRE_LEGEND + COSTS_LEGEND
    if any("/mquake_" in metric for metric in metrics):
        return MQUAKE_LEGEND
    if any("/dune_" in metric for metric in metrics):
        return DUNE_LEGEND
    return LEGEND + (EXACT_LEGEND if any(metric.endswith("/exact_match") for metric in metrics) else "")
