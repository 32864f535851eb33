"""Figures of a benchmark: metrics over the number of edits, generality against locality, time and memory."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modules.metrics import from_file
from trainers.benchmark.groups import Group, Result, apart, group_of
from trainers.benchmark.tables import edit_mib, keeps_values, metrics_of, points, seconds_per_edit
from trainers.drawing.curves import limits
from trainers.drawing.style import COLOURS, DASHES, MARKERS, blank, legend, open_axes, over_edits

# what generality and locality are called, by protocol
TRADE = (("generality/", "counterfact/PS", "zsre/paraphrase"), ("locality/", "counterfact/NS", "zsre/specificity"))
IN_WORDS = {"PS": "rephrases, PS", "NS": "neighbours, NS"}


def write_figures(results: Sequence[Result], folder: Path) -> None:
    """One file for each data set and mode that has something to show."""
    folder.mkdir(parents=True, exist_ok=True)
    for dataset in dict.fromkeys(r["dataset"] for r in results):
        of = [r for r in results if r["dataset"] == dataset]
        for name, figure in (("edits", over_number(of)), ("trade", trade(of)), ("cost", cost(of))):
            if figure is not None:
                figure.savefig(folder / f"{dataset}-{name}.png")


def over_number(results: Sequence[Result]) -> Figure | None:
    """A panel a metric: its value over the number of edits, an editor a colour, a mode a dash. Where an editor's edits
    were also made in batches, single ones are the batch of one that its curve begins with. Runs of one mode share a
    curve where it has one value at each number of edits."""
    at: dict[tuple[str, str], list[tuple[int, Mapping[str, Any]]]] = {}
    names = _curves({group_of(result, point["edits"]): None for result, point in points(results)})
    batches = {result["editor"] for result, _ in points(results) if result["mode"] == "batch"}
    begins = {"single", "batch"} <= set(names.values()) and ("batch", 1) not in {(g.mode, g.edits) for g in names}
    for result, point in points(results):
        mode = names[group_of(result, point["edits"])]
        mode = "batch" if begins and mode == "single" and result["editor"] in batches else mode
        at.setdefault((result["editor"], mode), []).append((point["edits"], point["metrics"]))
    stops = sorted({n for found in at.values() for n, _ in found})
    columns = metrics_of([m for found in at.values() for _, m in found])
    if len(stops) < 2 or not columns:
        return None
    figure = blank(3.2 * len(columns), 3.8)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    look, modes = _looks(results), list(dict.fromkeys(mode for _, mode in at))
    for axes, (metric, title) in zip(panels, columns, strict=True):
        for (editor, mode), found in at.items():
            colour, marker = look[editor]
            line = sorted((n, from_file(m[metric]["value"])) for n, m in found if metric in m)
            edits, values = [n for n, _ in line], [value for _, value in line]  # none where the editor lacks the metric
            style = DASHES[modes.index(mode) % len(DASHES)]
            first = mode == next(m for e, m in at if e == editor)
            axes.plot(
                edits,
                values,
                style,
                color=colour,
                marker=marker,
                markersize=3.5,
                label=editor if first else f"_{editor} ({mode})",  # in no legend
            )
        for i, mode in enumerate(modes if len(modes) > 1 else ()):
            axes.plot([], [], DASHES[i % len(DASHES)], color="black", label=mode)
        axes.set(title=title, ylim=limits(metric))
        over_edits(axes, stops)
        axes.set_xlabel("edits")
    legend(figure, panels[0])
    return figure


def _curves(groups: Iterable[Group]) -> dict[Group, str]:
    """The curve that each is a point of, by its mode and what tells it from another curve of that mode."""
    found, every = {}, list(groups)
    for group in every:
        same = [other for other in every if other.mode == group.mode]
        one = len({g.batch for g in same}) == 1 and len({g.edits for g in same}) == len(same)
        found[group] = group.mode if one else group.mode + apart(group, same)
    return found


def trade(results: Sequence[Result]) -> Figure | None:
    """Generality against locality: a point an editor, a panel a number of edits and run."""
    groups: dict[Group, list[tuple[str, float, float]]] = {}
    names = ("generality", "locality")
    for result, point in points(results):
        general, local = (_first(point["metrics"], sorts) for sorts in TRADE)
        if general and local:
            names = (general[0], local[0])
            groups.setdefault(group_of(result, point["edits"]), []).append((result["editor"], general[1], local[1]))
    if not groups:
        return None
    figure = blank(3.6 * len(groups), 4.6)
    panels = figure.subplots(1, len(groups), sharex=True, sharey=True, squeeze=False)[0]
    look = _looks(results)
    for axes, (group, found) in zip(panels, groups.items(), strict=True):
        alike = (other for other in groups if (other.mode, other.edits) == (group.mode, group.edits))
        title = f"{group.edits}, {group.mode}" + apart(group, alike)
        for editor, generality, locality in found:
            colour, marker = look[editor]
            axes.plot(
                [generality], [locality], marker, color=colour, label=editor, markersize=7.5, markeredgecolor="white"
            )
        axes.set(title=title, xlabel=IN_WORDS.get(names[0], names[0]))
        open_axes(axes, "both")
    every = [at for found in groups.values() for at in found]
    limits_of = {"xlim": _around([x for _, x, _ in every]), "ylim": _around([y for *_, y in every])}
    panels[0].set(ylabel=IN_WORDS.get(names[1], names[1]), **limits_of)  # the other panels share them
    legend(figure, panels[0])
    return figure


def _around(values: Sequence[float]) -> tuple[float, float]:
    """From a little below the least of these shares to a little above the largest."""
    room = 0.06 * max(0.1, max(values) - min(values))
    return max(-0.03, min(values) - room), min(1.03, max(values) + room)


def cost(results: Sequence[Result]) -> Figure | None:
    """Seconds an edit, and the memory that editing takes, by editor, at the largest number of edits.

    Editors whose values an earlier cell may have found are not shown.
    """
    largest = max((p["edits"] for _, p in points(results)), default=0)
    some = [(r, p) for r, p in points(results) if p["edits"] == largest and not keeps_values(r)]
    rows = [(r["editor"], seconds_per_edit(p), edit_mib(p)) for r, p in some]
    rows = list({name: (name, s, m) for name, s, m in rows}.values())
    if not rows:
        return None
    figure = blank(7.2, 0.9 + 0.28 * len(rows))
    left, right = figure.subplots(1, 2, sharey=True)
    look = _looks(results)
    for axes, i, title in ((left, 1, "seconds an edit"), (right, 2, "memory of editing, MiB")):
        lengths = [r[i] or 0.0 for r in rows]
        axes.barh([r[0] for r in rows], lengths, color=[look[r[0]][0] for r in rows], height=0.65)
        for y, row in enumerate(rows):
            if row[i] is None:
                axes.text(0, y, " not measured", va="center", fontsize=7, color="#777777")
        _readable(axes, title)
    left.invert_yaxis()
    figure.suptitle(f"{largest} edits", fontsize=10)
    return figure


def _first(metrics: Mapping[str, Any], sorts: tuple[str, ...]) -> tuple[str, float] | None:
    """Title and value of the main metric whose name begins with one of these."""
    found = ((title, metrics[m]["value"]) for m, title in metrics_of([metrics]) if m.startswith(sorts))
    return next(found, None)


def _looks(results: Sequence[Result]) -> dict[str, tuple[str, str]]:
    editors = dict.fromkeys(r["editor"] for r in results)
    return {n: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i, n in enumerate(editors)}


def _readable(axes: Axes, title: str) -> None:
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    open_axes(axes, "x")
