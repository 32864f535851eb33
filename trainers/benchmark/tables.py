"""A benchmark's results as CSV, and as tables in Markdown and LaTeX, one for each data set and run."""

import csv
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.fluency import CONSISTENCY, FLUENCY
from modules.metrics import from_file
from trainers.benchmark.groups import Group, Result, apart, group_of, numbers
from trainers.columns import COLUMNS, CONSISTENCY_LEGEND, FLUENCY_LEGEND, UNRANKED
from trainers.markdown import markdown_table
from trainers.report_table import contradictions
from trainers.written import write_text

LEGENDS = ((FLUENCY, FLUENCY_LEGEND), (CONSISTENCY, CONSISTENCY_LEGEND))
FIELDS: tuple[str, ...] = (
    "dataset",
    "mode",
    "batch",
    "edits",
    "asked",
    "editor",
    "protocol",
    "metric",
    "value",
    "low",
    "high",
    "records",
    "seconds_per_edit",
    "edit_mib",
    "hardware",
    "seed",
)


def points(results: Sequence[Result]) -> Iterator[tuple[Result, dict[str, Any]]]:
    """Every cell with each of the numbers of edits that it has figures of."""
    for result in results:
        for point in result.get("points", ()):
            yield result, point


def write_csv(results: Sequence[Result], file: Path) -> None:
    """Every metric of every cell, a line each; the interval is of 95%."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    for result, point in points(results):
        line = {name: result[name] for name in ("dataset", "mode", "batch", "editor", "protocol", "seed")}
        line |= {
            "edits": point["edits"],
            "asked": result.get("asked"),
            "seconds_per_edit": f"{seconds_per_edit(point):.6g}",
            "edit_mib": edit_mib(point),
            "hardware": result.get("hardware"),
        }
        for metric, cell in point["metrics"].items():
            value, low, high = (f"{from_file(x):.6g}" for x in (cell["value"], *cell["ci"]))
            writer.writerow(
                line | {"metric": metric, "value": value, "low": low, "high": high} | {"records": cell["records"]}
            )
    write_text(file, text.getvalue())


def write_tables(results: Sequence[Result], out: Path) -> None:
    """tables.md and tables.tex: a table for each data set, run and number of edits; the best of a column in bold."""
    markdown, latex = [], []
    for title, heads, rows, notes in _tables(results):
        if not rows:  # every cell failed
            markdown.append("\n\n".join([f"## {title}", *notes]))
            continue
        lines = [[name, *(f"**{text}**" if best else text for text, best in row)] for name, row in rows]
        markdown.append("\n\n".join([f"## {title}", markdown_table(heads, lines), *notes]))
        latex.append(_latex(title, heads, rows))
    write_text(out / "tables.md", "\n\n".join(markdown) + "\n")
    write_text(out / "tables.tex", "% needs \\usepackage{booktabs}\n" + "\n".join(latex))


def seconds_per_edit(point: Mapping[str, Any]) -> float:
    """Of a single request: a record of MQuAKE holds several. Cells of before `requests` was counted tell them by the
    records that were asked."""
    edits = [r["requested_rewrite"] for r in point["records"] if "requests" not in point]
    several = sum(len(edit) if isinstance(edit, list) else 1 for edit in edits) / max(1, len(edits))
    return point["edit_seconds"] / max(1, point.get("requests", point["edited"] * max(1, several)))


def keeps_values(result: Result) -> bool:
    """Whether its seconds are not the method's: value vectors that an earlier cell found are read."""
    values = result.get("facts", {}).get("init_args", {}).get("values") or {}
    return bool(values.get("keep"))


def edit_mib(point: Mapping[str, Any]) -> int | None:
    """The most memory in MiB that making the edits took above what was held before; None of a cell of before it was
    measured, which tells what the whole cell held, answers with it."""
    return round(point["edit_bytes"] / 2**20) if "edit_bytes" in point else None


def metrics_of(cells: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(metric, title) of the main metrics that any of these has, in the order of the project's tables."""
    present = {metric for metrics in cells for metric in metrics}
    known = [(metric, title) for metric, title, _ in COLUMNS if metric in present]
    return known or [(metric, metric) for metric in sorted(present)]


Row = tuple[str, list[tuple[str, bool]]]


def _tables(results: Sequence[Result]) -> Iterator[tuple[str, list[str], list[Row], list[str]]]:
    """(title, heads, rows of (editor, cells of (text, is the best)), notes); no rows where every cell failed."""
    groups: dict[Group, list[Result]] = {}
    for result in results:
        for edits in numbers(result):
            groups.setdefault(group_of(result, edits), []).append(result)
    for group, every in groups.items():
        edits = group.edits
        members = [(result, point) for result, point in points(every) if point["edits"] == edits]
        lacking = [r for r in every if all(p["edits"] != edits for p in r.get("points", ()))]
        missing = [f"{r['editor']} failed: {r['error']}" for r in lacking if "error" in r]
        if not members and not missing:
            continue
        if left := [r["editor"] for r in lacking if "error" not in r]:
            missing.append(f"Not run yet: {', '.join(left)}.")
        title = _title(group) + apart(group, (g for g in groups if _title(g) == _title(group)))
        if not members:
            yield title, [], [], missing
            continue
        columns = metrics_of([point["metrics"] for _, point in members])
        rows = _rows(members, columns)
        for (_, texts), (result, point) in zip(rows, members, strict=True):
            memory = edit_mib(point)
            texts += [("-" if keeps_values(result) else f"{seconds_per_edit(point):.2f}", False)]
            texts += [("-" if memory is None else f"{memory:,}", False)]
        counts = {
            p["metrics"][metric]["records"] for _, p in members for metric, _ in columns if metric in p["metrics"]
        }
        records = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(*counts)
        notes = [f"Percent with 95% bootstrap intervals, over {records} records; protocol {members[0][0]['protocol']}."]
        if edits < (available := max(r.get("records_available", 0) for r, _ in members)):
            notes.append(f"The records are drawn of {available:,}.")
        notes += [text.strip() for metric, text in LEGENDS if any(metric == shown for shown, _ in columns)]
        notes += contradictions({r["editor"]: {str(edits): p["settings"]} for r, p in members})
        notes += _kept([r for r, _ in members])
        notes += _made([r for r, _ in members]) + _codes([r for r, _ in members])
        heads = ["Editor", *(title for _, title in columns), "s / edit", "edit MiB"]
        yield title, heads, rows, notes + missing
        if kinds := _kinds([point["metrics"] for _, point in members], [metric for metric, _ in columns]):
            yield f"{title}, by kind", ["Editor", *(name for _, name in kinds)], _rows(members, kinds), []


def _rows(members: Sequence[tuple[Result, dict[str, Any]]], columns: Sequence[tuple[str, str]]) -> list[Row]:
    """A row for each cell, with the best of those that compete in each column."""
    best = {
        metric: max(
            (
                value
                for r, p in members
                if metric in p["metrics"] and _competes(r, p) and not math.isnan(value := _shown(p, metric))
            ),
            default=None,
        )
        for metric, _ in columns
    }
    rows: list[Row] = []
    for result, point in members:
        texts = []
        for metric, _ in columns:
            cell = point["metrics"].get(metric)
            top = cell is not None and _shown(point, metric) == best[metric] and _competes(result, point)
            top = top and metric not in UNRANKED
            texts.append(("-", False) if cell is None else (_percent(cell), top and cell["value"] > 0))
        rows.append((result["editor"], texts))
    return rows


def _kinds(cells: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> list[tuple[str, str]]:
    """(metric, "portability: reasoning") of what any of these says of one kind of questions alone, by kind, hops or
    criterion: the parts of the metrics that are shown."""
    parts = {metric: metric.split("/") for metric in sorted({metric for metrics in cells for metric in metrics})}
    found = [(m, p) for m, p in parts.items() if len(p) == 3 and f"{p[0]}/{p[2]}" in shown]
    several = Counter(where for _, (where, _, _) in found)  # the only kind is the whole
    return [(m, f"{where}: {kind.replace('_', ' ')}") for m, (where, kind, _) in found if several[where] > 1]


def _title(group: Group) -> str:
    how = group.mode + (f" by {group.batch}" if group.mode == "consecutive" else "")
    return f"{group.dataset}, {how}, " + (f"{group.edits} edits" if group.edits > 1 else "single edits")


def _kept(members: Sequence[Result]) -> list[str]:
    """A line that says whose seconds are not shown."""
    if not (kept := [r["editor"] for r in members if keeps_values(r)]):
        return []
    return [f"Value vectors are found once for all runs, so that a run's seconds tell nothing: {', '.join(kept)}."]


def _made(members: Sequence[Result]) -> list[str]:
    """A line that says when and on what a table's cells were computed, and whose seconds do not compare; older cells do
    not tell."""
    days = sorted({r["date"][:10] for r in members if "date" in r})
    by: dict[str, list[str]] = {}
    for result in members:
        by.setdefault(result.get("hardware", "not told"), []).append(result["editor"])
    on = next(iter(by)) if len(by) == 1 else "; ".join(f"{what} ({', '.join(editors)})" for what, editors in by.items())
    apart = " Seconds and memory of different machines do not compare." if len(by) > 1 else ""
    return [f"Computed {' to '.join(dict.fromkeys([days[0], days[-1]]))}, on {on}.{apart}"] if days else []


def _codes(members: Sequence[Result]) -> list[str]:
    """A line where a table's cells were not all computed by the same code; older ones do not say by which."""
    by: dict[str, list[str]] = {}
    for result in members:
        by.setdefault(result.get("code", "")[:8] or "not told", []).append(result["editor"])
    told = "; ".join(f"{', '.join(editors)} ({code})" for code, editors in by.items())
    return [f"Computed by different code, which may differ in what it measures: {told}."] if len(by) > 1 else []


def _shown(point: Mapping[str, Any], metric: str) -> float:
    """As far as the table shows it: equal figures are equally good."""
    return round(from_file(point["metrics"][metric]["value"]), 3)


def _competes(result: Result, point: Mapping[str, Any]) -> bool:
    """The unedited model and upper bounds are there to compare with, not to win."""
    return result["editor"] != "unedited" and not point["settings"].get("own_edit_only", False)


def _percent(cell: Mapping[str, Any]) -> str:
    value, low, high = (100 * from_file(x) for x in (cell["value"], *cell["ci"]))
    return f"{value:.1f} ({low:.0f}-{high:.0f})"


def _latex(title: str, heads: list[str], rows: list[Row]) -> str:
    body = [" & ".join([_escaped(n), *(f"\\textbf{{{t}}}" if best else t for t, best in row)]) for n, row in rows]
    return "\n".join(
        [
            "\\begin{table}",
            f"\\caption{{{_escaped(title)}}}",
            f"\\begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}",
            "\\toprule",
            " & ".join(map(_escaped, heads)) + " \\\\",
            "\\midrule",
            *(f"{line} \\\\" for line in body),
            "\\bottomrule",
            "\\end{tabular}",
            "\\end{table}",
            "",
        ]
    )


def _escaped(text: str) -> str:
    return "".join(f"\\{c}" if c in "_%&#$" else c for c in text)
