"""Figures that compare editors: what is retained over the number of edits, and a trained editor beside others.

Values in, a matplotlib Figure out; nothing here knows of a run. Colours and style are those of figures.py.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainers.callbacks.figures import GOLDEN, ZERO, blank, open_axes
from trainers.report import COLUMNS, Report

# Okabe-Ito again, then the same with other dashes
COLOURS = (GOLDEN, ZERO, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
METRICS = tuple((metric, title) for metric, title, _ in COLUMNS if not metric.endswith("/exact_match"))


def retention(report: Report) -> Figure:
    """Metrics over the number of edits so far (solid: all of them; dashed: the first ones), and the growth of edited
    matrices' L1 norms (EAC, figure 2), an editor a colour.

    Args:
        report: as trainers/retention.py makes it.
    """
    curves: dict[str, list[dict[str, Any]]] = report["curves"]
    cells = report["aggregate"]
    shown = [(m, t) for m, t in METRICS if any(m in cell for name in curves for cell in cells[name].values())]
    grown = {name: points for name, points in curves.items() if any(p["norms"] for p in points)}
    figure = blank(3.2 * (len(shown) + bool(grown)), 3.6)
    panels = figure.subplots(1, len(shown) + bool(grown), squeeze=False)[0]
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(curves)}
    for axes, (metric, title) in zip(panels, shown, strict=False):
        for name, points in curves.items():
            at = [p["edits"] for p in points if metric in cells[name][str(p["edits"])]]
            values = [cells[name][str(n)][metric]["value"] for n in at]
            axes.plot(at, values, "o-", color=colour[name], label=name, markersize=3.5, linewidth=1.4)
            early = [(p["edits"], p["first"][metric]) for p in points if metric in p["first"]]
            axes.plot(*zip(*early, strict=True), "--", color=colour[name], linewidth=1) if early else None
        axes.set(title=title, ylim=(-0.03, 1.03))
        _over_edits(axes)
    if grown:
        for name, points in grown.items():
            growth = [100 * _growth(p["norms"]) for p in points if p["norms"]]
            at = [p["edits"] for p in points if p["norms"]]
            panels[-1].plot(at, growth, "o-", color=colour[name], label=name, markersize=3.5, linewidth=1.4)
        panels[-1].set(title="L1 norm of edited matrices", ylabel="growth [%]")
        _over_edits(panels[-1])
    _legend(figure, panels[0])
    first = min((points[0]["edits"] for points in curves.values() if points), default=0)
    figure.suptitle(f"After so many edits: of all of them, and dashed of the first {first}", fontsize=10)
    return figure


def comparison(
    steps: Sequence[int],
    trained: str,
    values: Sequence[Mapping[str, float]],
    others: Mapping[str, Mapping[str, float]],
    what: str = "",
) -> Figure:
    """The trained editor's metrics over training steps, against those of others as level lines.

    Args:
        steps: of the validations so far.
        trained: the trained editor's name.
        values: its metrics at each of them.
        others: metrics by editor.
        what: the title's second half, such as how many edits were made together.
    """
    shown = [(m, t) for m, t in METRICS if any(m in v for v in (*values, *others.values()))]
    figure = blank(3.2 * max(1, len(shown)), 3.8)
    panels = figure.subplots(1, max(1, len(shown)), squeeze=False)[0]
    for axes, (metric, title) in zip(panels, shown, strict=False):
        at = [(step, v[metric]) for step, v in zip(steps, values, strict=True) if metric in v]
        axes.plot(*zip(*at, strict=True), "o-", color=COLOURS[0], label=trained, linewidth=1.8) if at else None
        for i, (name, found) in enumerate(others.items()):
            style = {"color": COLOURS[1 + i % (len(COLOURS) - 1)], "linestyle": DASHES[i // (len(COLOURS) - 1) % 4]}
            # an editor without this metric is in the legend all the same
            axes.axhline(found.get(metric, float("nan")), label=name, linewidth=1.2, **style)
        axes.set(title=title, xlabel="step", ylim=(-0.03, 1.03))
        open_axes(axes)
    _legend(figure, panels[0])
    figure.suptitle(f"{trained} against editors without training{what and f', {what}'}", fontsize=10)
    return figure


def _growth(norms: Mapping[str, Mapping[str, float]]) -> float:
    """Of all edited matrices together, relative to the unedited ones."""
    before = sum(n["unedited"] for n in norms.values())
    return sum(n["edited"] for n in norms.values()) / before - 1 if before else 0.0


def _over_edits(axes: Axes) -> None:
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlabel("edits so far")
    axes.set_xlim(left=0.8)
    open_axes(axes)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
