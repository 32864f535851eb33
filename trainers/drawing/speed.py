"""The figure of `trainers.speed`: values in, a matplotlib Figure out."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from modules.speed import Measured
from trainers.drawing.style import COLOURS, MARKERS, blank, legend, open_axes, over_edits

# title, unit, whether on a logarithmic axis, and what is drawn with what a unit of it is worth
PANELS = (
    ("encoding the edits", "seconds", True, {"encode_seconds": 1.0}),
    ("decoding a token", "milliseconds", False, {"token_seconds": 1e3}),
    ("kept of the edits", "MiB", True, {"state_bytes": 2.0**-20}),
    ("accuracy (dashed: rephrases)", "token accuracy", False, {"reliability": 1.0, "generality": 1.0}),
)
BARS = (
    ("encoding, seconds", True, "encode_seconds", 1.0),
    ("prompt, ms", False, "prompt_seconds", 1e3),
    ("a token, ms", False, "token_seconds", 1e3),
    ("kept, MiB", True, "state_bytes", 2.0**-20),
    ("memory more, MiB", False, "peak_bytes", 2.0**-20),
)


def speed_figure(rows: Sequence[Measured]) -> Figure:
    """Lines over numbers of edits (figure 3 of InComeS); bars where there is one number."""
    return _bars(rows) if len({r.edits for r in rows}) == 1 else _lines(rows)


def _lines(rows: Sequence[Measured]) -> Figure:
    """Seconds of encoding and of a token, what is kept, and accuracy, an editor a colour. Where an editor could not go
    further, a dotted line of its colour stands."""
    editors = list(dict.fromkeys(r.editor for r in rows))
    sizes = sorted({r.edits for r in rows})
    figure = blank(13, 3.8)
    panels: Any = figure.subplots(1, len(PANELS))
    for axes, (title, unit_of, logarithmic, parts) in zip(panels, PANELS, strict=True):
        for i, editor in enumerate(editors):
            own = [r for r in rows if r.editor == editor]
            marker = MARKERS[i // len(COLOURS) % len(MARKERS)]
            look = {"color": COLOURS[i % len(COLOURS)], "marker": marker, "markersize": 3.5}
            for dash, (what, unit) in zip(("-", "--"), parts.items(), strict=False):
                values = [(r.edits, getattr(r, what)) for r in own]
                at = [(n, unit * v) for n, v in values if v is not None and (v or not logarithmic)]
                name = editor if dash == "-" else None
                axes.plot([n for n, _ in at], [v for _, v in at], dash, label=name, linewidth=1.4, **look)
            stopped = min((r.edits for r in own if r.error), default=None)
            if stopped is not None:
                label = f"{editor}: could not"
                axes.axvline(stopped, color=look["color"], linestyle=":", linewidth=1.2, label=label)
        axes.set(title=title, ylabel=unit_of)
        over_edits(axes, sizes)
        axes.set_xlabel("edits")
        if logarithmic:
            _logarithmic(axes)
        elif unit_of == "token accuracy":
            axes.set_ylim(-0.03, 1.03)
        else:
            axes.set_ylim(bottom=0)
    legend(figure, panels[0])
    figure.suptitle("Encoding, decoding, memory and accuracy over the number of edits", fontsize=10)
    return figure


def _bars(rows: Sequence[Measured]) -> Figure:
    """What each editor costs at one number of edits, a panel a cost."""
    figure = blank(13, 1.1 + 0.25 * len(rows))
    panels: Any = figure.subplots(1, len(BARS), sharey=True)
    names = [r.editor for r in rows]
    for axes, (title, logarithmic, what, unit) in zip(panels, BARS, strict=True):
        lengths = [unit * (getattr(r, what) or 0.0) for r in rows]
        axes.barh(names, lengths, color=COLOURS[1], height=0.65)
        for y, row in enumerate(rows):
            if getattr(row, what) is None:
                where = axes.get_yaxis_transform()  # the left edge, whatever the scale
                axes.text(0, y, " -", va="center", fontsize=7, color="#777777", transform=where)
        if logarithmic and any(lengths):
            axes.set_xscale("log")
            axes.set_xlim(left=10 ** math.floor(math.log10(min(filter(None, lengths)))))  # where the shortest shows
            axes.xaxis.set_major_formatter("{x:g}")
            axes.minorticks_off()
        axes.set_title(title, fontsize=9)
        open_axes(axes, "both")
    panels[0].invert_yaxis()
    figure.suptitle(f"{rows[0].edits:,} edits made at once", fontsize=10)
    return figure


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
