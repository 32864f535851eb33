"""What all figures share: colours, markers and dashes, empty figures, axes and legends.

Colours are of the Okabe-Ito palette, which the colour-blind can tell apart. pyplot's global state is not used.
"""

from collections.abc import Sequence
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

GOLDEN, ZERO, OTHER = "#D55E00", "#0072B2", "#666666"
# of several editors; beyond these the same with other markers, or dashes where there are none
COLOURS = (GOLDEN, ZERO, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D")


def blank(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return Figure(figsize=(width, height), layout="constrained", dpi=110)


def open_axes(axes: Axes, grid: Literal["x", "y", "both"] = "y") -> None:
    """Axes without a box, with a faint grid at the ticks of one axis or both."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def over_edits(axes: Axes, stops: Sequence[int]) -> None:
    """A logarithmic axis of numbers of edits, these marked as far as there is room."""
    axes.set_xscale("log")
    apart = [n for i, n in enumerate(stops) if not i or n >= 1.5 * stops[i - 1] or n == stops[-1]]
    axes.set_xticks(apart, [str(n) for n in apart])
    axes.minorticks_off()
    axes.set_xlabel("edits so far")
    open_axes(axes)


def legend(figure: Figure, axes: Axes) -> None:
    """A legend of these axes below the figure."""
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)


def shorten(text: str, most: int) -> str:
    """The text in one line, cut to `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"
