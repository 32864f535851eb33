"""The temperature at which InComeS selects among many edits as among few (figure 4a)."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from modules.gist.analysis_temperature import Aligned
from trainers.drawing.style import GOLDEN, OTHER, ZERO, blank, over_edits

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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _drawn(values: Any) -> list[float]:
    """What there is none of leaves a gap."""
    return [float("nan") if v is None else v for v in values]
