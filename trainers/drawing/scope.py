"""The figure of `trainers.scope`: z-scores by hook layer and kind of text, and the threshold (COMEBA-HK, figure 3)."""

import random
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from modules.training_free.hook_scores import Scored
from trainers.drawing.style import GOLDEN, OTHER, ZERO, blank, open_axes

COLOURS = {"reliability": ZERO, "generality": "#009E73", "locality": GOLDEN}
WHAT = {
    "reliability": "edited prompts, subject",
    "generality": "rephrases, subject",
    "locality": "other texts, highest token",
}


def scope_figure(found: Sequence[Scored], alphas: Mapping[str, float], relative: bool) -> Figure:
    """A panel a layer, a column of points a kind of text, the layer's threshold as a line.

    Args:
        relative: whether scores are shares of what a text's length allows.
    """
    kinds = [k for k in WHAT if any(s.kind == k for s in found)]
    figure = blank(2.1 * len(alphas) + 0.4, 3.4)
    panels = figure.subplots(1, len(alphas), squeeze=False, sharey=True)[0]
    jitter = random.Random(0)
    for axes, (layer, alpha) in zip(panels, alphas.items(), strict=True):
        for x, kind in enumerate(kinds):
            values = [s.score for s in found if s.kind == kind and s.layer == layer and s.score is not None]
            places = [x + jitter.uniform(-0.28, 0.28) for _ in values]
            axes.scatter(places, values, s=5, color=COLOURS[kind], alpha=0.5, linewidths=0, label=WHAT[kind])
        axes.axhline(alpha, color=OTHER, linewidth=1, linestyle="--", label="threshold alpha")
        axes.set(title=layer.removesuffix(".mlp.down_proj"), xticks=[], xlim=(-0.6, len(kinds) - 0.4))
        open_axes(axes)
    panels[0].set_ylabel("z-score, share of the bound" if relative else "z-score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8, markerscale=2)
    figure.suptitle("What stands out at each hook layer", fontsize=10)
    return figure
