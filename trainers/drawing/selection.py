"""Figures of what tokens select among gists (InComeS, figure 4): tensors and labels in, a matplotlib Figure out.

L layers (1 where all share one choice), T tokens, N edits; the zero-gist is the last choice.
"""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from modules.gist.analysis import Profile, Selection
from modules.gist.analysis_traces import Place
from trainers.drawing.style import GOLDEN, OTHER, ZERO, blank, legend, open_axes, shorten

CHOICES = "Blues"  # one hue from light to dark
MOST_TOKENS = 40  # rows of a heat map; of a longer query the last ones, where the answer is


def heat_map(selection: Selection, edits: Sequence[str], panels: Sequence[str], columns: int = 5) -> Figure:
    """Tokens x edits, a panel per layer. The golden edit is framed, the tokens that predict the answer are bold.

    Args:
        edits: names of the N edits, such as their subjects.
        panels: names of the L layers.
        columns: panels side by side, at most.
    """
    first = max(0, len(selection.tokens) - MOST_TOKENS)
    shown = selection.probabilities[:, first:].float()
    tokens, answer_from = selection.tokens[first:], max(0, selection.answer_from - first)
    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)
    figure = blank(max(7.5, columns * (0.12 * len(edits) + 0.5) + 1.6), rows * (0.14 * len(tokens) + 0.4) + 2.0)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    image = None
    for i, axes in enumerate(grid.flat):
        if i >= len(panels):
            axes.axis("off")
            continue
        image = axes.imshow(shown[i].numpy(), cmap=CHOICES, vmin=0, vmax=1, aspect="auto", interpolation="none")
        axes.set_title(panels[i], fontsize=8)
        _mark(axes, selection.golden, len(edits), len(tokens), answer_from)
        lowest = i + columns >= len(panels)
        axes.tick_params(length=2, labelbottom=lowest)
        axes.set_xticks(range(len(edits) + 1), [shorten(e, 14) for e in (*edits, "zero-gist")], rotation=90)
        axes.set_yticks(range(len(tokens)), tokens)
        _plain([*axes.get_xticklabels(), *axes.get_yticklabels()], 6, in_layout=not lowest or i // columns == rows - 1)
        _emphasise(axes.get_xticklabels(), {selection.golden: GOLDEN, len(edits): ZERO})
        _emphasise(axes.get_yticklabels(), dict.fromkeys(range(answer_from, len(tokens)), "black"))
    assert image is not None
    figure.colorbar(image, ax=grid, label="probability of reading", shrink=min(1.0, 3 / figure.get_figheight()))
    figure.suptitle(_title(selection), fontsize=9, parse_math=False)
    figure.supxlabel("edits in the pool (the right one is framed)", fontsize=8)
    figure.supylabel("tokens of the query (bold: they predict the answer)", fontsize=8)
    return figure


def layer_profile(layers: Sequence[int], in_scope: Profile, out_of_scope: Profile | None = None) -> Figure:
    """Zero-gist probability, golden-gist probability and entropy by layer, in and out of scope (figure 4b).

    Args:
        layers: numbers of the active layers; where a profile has one choice for all of them it is a level line.
    """
    figure = blank(10, 3.5)
    panels: Any = figure.subplots(1, 3)
    names = {
        "zero": ("reads nothing", "probability of the zero-gist"),
        "golden": ("reads the right edit", "probability of the golden gist"),
        "entropy": ("undecided", "entropy of the choice [nats]"),
    }
    for axes, (name, (title, label)) in zip(panels, names.items(), strict=True):
        drawn = [("in scope", in_scope, GOLDEN, "o-")]
        if out_of_scope is not None and name != "golden":
            drawn.append(("out of scope", out_of_scope, ZERO, "s--"))
        for scope, values, colour, style in drawn:
            y = getattr(values, name).float().expand(len(layers)).numpy()
            axes.plot(layers, y, style, color=colour, label=scope, markersize=4, linewidth=1.5)
        axes.set(title=title, xlabel="layer", ylabel=label)
        highest = max(float(getattr(values, name).max()) for _, values, *_ in drawn)
        axes.set_ylim((-0.03, 1.03) if name != "entropy" else (0, 1.1 * highest + 0.01))
        axes.xaxis.get_major_locator().set_params(integer=True)
        open_axes(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    shared = " (one choice for all layers)" if len(in_scope.zero) < len(layers) else ""
    figure.suptitle(f"What tokens that predict the answer select{shared}", fontsize=10)
    return figure


def token_trace(selections: Sequence[Selection]) -> Figure:
    """Zero-gist and golden-gist probability, and below them the entropy, along each query's tokens (figure 4c, 4d).

    Means over layers. The tokens that predict the answer stand on a grey ground.
    """
    tokens = max(min(len(s.tokens), MOST_TOKENS) for s in selections)
    width = max(4.5, 0.2 * tokens + 1.2)  # inches
    figure = blank(width * len(selections), 4.8)
    grid = figure.subplots(2, len(selections), sharex="col", sharey="row", squeeze=False, height_ratios=[2, 1])
    for column, selection in enumerate(selections):
        above, below = grid[:, column]
        first = max(0, len(selection.tokens) - MOST_TOKENS)
        at = range(len(selection.tokens) - first)
        lines = (
            (above, selection.of_golden, GOLDEN, "o-", "golden gist"),
            (above, selection.zero, ZERO, "s--", "zero-gist"),
            (below, selection.entropy, OTHER, "^-", "entropy"),
        )
        for axes, values, colour, style, label in lines:
            y = values.float().mean(0)[first:].numpy()
            axes.plot(at, y, style, color=colour, label=label, markersize=3.5, linewidth=1.3)
        for axes in (above, below):
            axes.axvspan(selection.answer_from - first - 0.5, len(at) - 0.5, color="#EEEEEE", zorder=0, linewidth=0)
            open_axes(axes)
        above.set_ylim(-0.03, 1.03)
        above.tick_params(labelbottom=False)
        above.set_title(_title(selection, int(16 * (width - 0.5))), fontsize=8, parse_math=False)
        below.set_xticks(at, selection.tokens[first:], rotation=90)
        _plain(below.get_xticklabels(), 7)
    grid[1, 0].set_ylim(0, 1.1 * max(float(s.entropy.mean(0).max()) for s in selections) + 0.01)
    grid[0, 0].set_ylabel("probability")
    grid[1, 0].set_ylabel("entropy [nats]")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.supxlabel("tokens of the query (grey: they predict the answer)", fontsize=8)
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


def _title(selection: Selection, most: int = 100) -> str:
    """Query, golden edit and whether the answer is right, in lines of at most `most` characters."""
    about = f"edit: {selection.edit}" if selection.golden is not None else "about none of the edits"
    answered = {True: ["answered right"], False: ["answered wrong"], None: []}[selection.right]
    return "\n".join(shorten(line, most) for line in (selection.question, about, *answered))


def _mark(axes: Axes, golden: int | None, zero: int, tokens: int, answer_from: int) -> None:
    """Frame the golden edit's column, set the zero-gist's apart, and draw a line above the answer."""
    axes.axvline(zero - 0.5, color=OTHER, linewidth=0.8)
    axes.axhline(answer_from - 0.5, color=OTHER, linewidth=0.8, linestyle=":")
    if golden is not None:
        frame = Rectangle((golden - 0.5, -0.5), 1, tokens, fill=False, edgecolor=GOLDEN, linewidth=1.4, label="golden")
        frame.set(clip_on=False, zorder=3)
        axes.add_patch(frame)


def _plain(labels: Sequence[Any], size: int, in_layout: bool = True) -> None:
    """Small tick labels in which $, ^ and _ are letters like any other; out of the layout, they may reach below it."""
    for label in labels:
        label.set(fontsize=size, parse_math=False, in_layout=in_layout)


def _emphasise(labels: Sequence[Any], colours: dict[Any, str]) -> None:
    for i, label in enumerate(labels):
        if i in colours:
            label.set(fontweight="bold", color=colours[i])
