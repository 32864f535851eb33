"""Figures that compare editors: what is retained over the number of edits, and a trained editor beside others.

Values in, a matplotlib Figure out; nothing here knows of a run.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modules.fluency import FLUENCY
from modules.metrics import from_file
from trainers.columns import COLUMNS
from trainers.drawing.style import COLOURS, DASHES, MARKERS, blank, legend, open_axes, over_edits
from trainers.report import Report

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
    look = {n: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % 4]) for i, n in enumerate(curves)}
    stops = sorted({p["edits"] for points in curves.values() for p in points})
    for axes, (metric, title) in zip(panels, shown, strict=False):
        for name, points in curves.items():
            at = [p["edits"] for p in points if metric in cells[name][str(p["edits"])]]
            values = [from_file(cells[name][str(n)][metric]["value"]) for n in at]
            _line(axes, name, look, at, values)
            early = [(p["edits"], from_file(p["first"][metric])) for p in points if metric in p["first"]]
            axes.plot(*zip(*early, strict=True), "--", color=look[name][0], linewidth=1) if early else None
        axes.set(title=title, ylim=limits(metric))
        over_edits(axes, stops)
    if grown:
        for name, points in grown.items():
            growth = [100 * _growth(p["norms"]) for p in points if p["norms"]]
            at = [p["edits"] for p in points if p["norms"]]
            _line(panels[-1], name, look, at, growth)
        panels[-1].set(title="L1 norm of edited matrices", ylabel="growth [%]")
        over_edits(panels[-1], stops)
    legend(figure, panels[0])
    figure.suptitle(
        f"After so many edits: of all of them, and dashed of the first {min(stops, default=0)}", fontsize=10
    )
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
    legend(figure, panels[0])
    figure.suptitle(f"{trained} against editors without training{what and f', {what}'}", fontsize=10)
    return figure


def limits(metric: str) -> tuple[float, float | None]:
    """Of a metric's axis: shares are from 0 to 1, CounterFact's magnitudes are differences, fluency is in bits."""
    if metric == FLUENCY:
        return 0, None
    return (-1.03 if metric.startswith("counterfact/") and metric.endswith("M") else -0.03), 1.03


def _growth(norms: Mapping[str, Mapping[str, float]]) -> float:
    """Of all edited matrices together, relative to the unedited ones."""
    before, after = (sum(from_file(n[what]) for n in norms.values()) for what in ("unedited", "edited"))
    return after / before - 1 if before else 0.0


def _line(
    axes: Axes, name: str, look: Mapping[str, tuple[str, str]], at: Sequence[int], values: Sequence[float]
) -> None:
    colour, marker = look[name]
    axes.plot(at, values, marker=marker, color=colour, label=name, markersize=3.5, linewidth=1.4)
