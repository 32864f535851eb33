"""General ability as a table: a row for each editor and number of edits, a column for each task's main metric."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from modules.metrics import from_file
from trainers.markdown import markdown_table

LEGEND = (
    "Percent of {examples}; with 95% bootstrap intervals over examples; in brackets the change from the unedited "
    "model, with a star where its interval, of each example's own difference, leaves out zero."
)


def rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Editor, edits, and the main metric of each task."""
    for editor, by_count in report["cells"].items():
        for count, cells in sorted(by_count.items(), key=lambda item: int(item[0])):
            yield [editor, count, *(_shown(cells.get(t, {}), about) for t, about in _tasks(report).items())]


def failures(report: Mapping[str, Any]) -> list[str]:
    """A line for each reason: editor, numbers of edits and tasks that failed by it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for editor, by_count in report["cells"].items():
        for count, cells in by_count.items():
            for task, cell in cells.items():
                if "error" in cell:
                    found.setdefault((editor, count, cell["error"]), []).append(task)
    return [
        f"{editor} failed after {n} edits on {', '.join(tasks)}: {why}" for (editor, n, why), tasks in found.items()
    ]


def markdown(report: Mapping[str, Any]) -> str:
    """The table in Markdown, with legend, failures and what was left out below it."""
    heads = ["Editor", "Edits", *_tasks(report)]
    return "\n".join([markdown_table(heads, rows(report)), "", *_notes(report)]) + "\n"


def print_ability(report: Mapping[str, Any], console: Console) -> None:
    """Print the same; where the output is no terminal, rich leaves out all styling."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("Editor", overflow="fold")
    for head in ("Edits", *_tasks(report)):
        table.add_column(head, justify="right")
    for row in rows(report):
        table.add_row(*row)
    console.print(table)
    for note in _notes(report):
        console.print(note, highlight=False, soft_wrap=True)


def _tasks(report: Mapping[str, Any]) -> Mapping[str, Any]:
    return report["meta"]["tasks"]


def _notes(report: Mapping[str, Any]) -> list[str]:
    by_size: dict[int, list[str]] = {}
    for about in _tasks(report).values():
        name = about["main"] if about.get("percent", True) else f"{about['main']} (no percentage)"
        by_size.setdefault(about["examples"], []).append(name)
    sizes = "; ".join(
        f"{count:,} examples {'each ' if len(names) > 1 else ''}of {', '.join(names)}"
        for count, names in by_size.items()
    )
    left_out = [f"Left out: {task}, {why}" for task, why in report["meta"]["left_out"].items()]
    return [LEGEND.format(examples=sizes), *failures(report), *left_out]


def _shown(cell: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """`52.0 [45.5, 59.0] (-3.0*)`, `failed`, or nothing where the task was not asked."""
    main, scale = about["main"], 100 if about.get("percent", True) else 1
    if "metrics" not in cell:
        return "failed" if "error" in cell else ""
    found = cell["metrics"][main]
    value, low, high = map(from_file, (found["value"], *found["ci"]))
    text = f"{scale * value:.1f} [{scale * low:.1f}, {scale * high:.1f}]"
    if change := cell.get("change", {}).get(main):
        value, low, high = map(from_file, (change["value"], *change["ci"]))
        text += f" ({scale * value:+.1f}{'*' if low > 0 or high < 0 else ''})"
    return text
