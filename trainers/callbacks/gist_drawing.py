"""The figures of `trainers.analyse`: values in, a matplotlib Figure out (see figures.py)."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from modules.gist.analysis_temperature import Aligned
from modules.gist.analysis_traces import Place
from trainers.callbacks.curves import legend, over_edits
from trainers.callbacks.figures import GOLDEN, OTHER, ZERO, blank, open_axes

ALL = "aligned, one for all layers"


def temperature_figure(found: Sequence[Aligned], reference: int, configured: float) -> Figure:
    """Aligned temperatures over pool sizes, a line a layer and a bold one for all; beside it the entropies (figure 4a).

    Args:
        configured: the temperature that the editor has now.
    """
    sizes = [a.edits for a in found]
    figure = blank(9, 3.8)
    left, right = figure.subplots(1, 2)
    layers = len(found[0].temperatures)
    for layer in range(layers if layers > 1 else 0):
        label = "one layer each" if layer == 0 else None
        left.plot(sizes, _drawn(a.temperatures[layer] for a in found), "-", color="#BBBBBB", linewidth=0.9, label=label)
    left.plot(sizes, _drawn(a.temperature for a in found), "o-", color=GOLDEN, markersize=4, label=ALL)
    left.axhline(configured, color=ZERO, linestyle="--", linewidth=1.2, label=f"as configured ({configured:g})")
    left.set(title="temperature that keeps the entropy", ylabel="temperature")
    left.set_ylim(bottom=0)
    then = [(a.edits, _mean(a.entropy_then)) for a in found if a.entropy_then]
    right.plot(sizes, [_mean(a.entropy) for a in found], "s-", color=OTHER, markersize=4, label="at temperature 1")
    right.plot(*zip(*then, strict=True), "o-", color=GOLDEN, markersize=4) if then else None
    goal = next(_mean(a.entropy) for a in found if a.edits == reference)
    label = f"pool of {reference}, temperature 1"
    right.axhline(goal, color="black", linestyle=":", linewidth=1.2, label=label)
    right.set(title="entropy of selection", ylabel="entropy [nats]")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        over_edits(axes, sizes)
        axes.set(xlabel="edits in the pool", xlim=(0.9 * sizes[0], 1.1 * sizes[-1]))
    handles = [axes.get_legend_handles_labels() for axes in (left, right)]
    figure.legend(
        [h for hs, _ in handles for h in hs],
        [label for _, ls in handles for label in ls],
        loc="outside lower center",
        ncols=3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle("Temperature by entropy alignment", fontsize=10)
    return figure


def place_figure(right: Sequence[Place], wrong: Sequence[Place], edits: int) -> Figure:
    """Golden-gist and zero-gist probability and entropy along queries that are answered rightly and wrongly, places
    counted from the answer (figure 4c, 4d)."""
    figure = blank(10, 3.6)
    panels: Any = figure.subplots(1, 3)
    drawn = [(name, p) for name, p in (("answered right", right), ("answered wrong", wrong)) if p]
    names = {
        "golden": ("reads the right edit", "probability of the golden gist", GOLDEN),
        "zero": ("reads nothing", "probability of the zero-gist", ZERO),
        "entropy": ("undecided", "entropy of the choice [nats]", OTHER),
    }
    for axes, (what, (title, label, colour)) in zip(panels, names.items(), strict=True):
        for name, places in drawn:
            queries = max(p.queries for p in places)
            style = "o-" if name == "answered right" else "s--"
            values = [getattr(p, what) for p in places]
            axes.plot([p.at for p in places], values, style, color=colour, markersize=2.5, linewidth=1.4)
            axes.plot([], [], style, color="black", markersize=3.5, linewidth=1.4, label=f"{name} ({queries} queries)")
        last = max(p.at for _, places in drawn for p in places)
        axes.axvspan(-0.5, last + 0.5, color="#EEEEEE", zorder=0, linewidth=0)
        axes.set(title=title, ylabel=label, xlabel="place")
        axes.set_ylim(-0.03, 1.03) if what != "entropy" else axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        open_axes(axes)
    legend(figure, panels[0])
    counted = "places counted from the first token that predicts the answer (grey: all that do); means over layers"
    figure.suptitle(f"What tokens select along a query, pools of {edits} edits\n{counted}", fontsize=9)
    return figure


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _drawn(values: Any) -> list[float]:
    """What there is none of leaves a gap."""
    return [float("nan") if v is None else v for v in values]
