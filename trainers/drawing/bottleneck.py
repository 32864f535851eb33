"""Figures of bottlenecks: which tokens get into an edit, and how edits lie in latent space."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from trainers.drawing.style import shorten

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C6D31"]
OTHER = "#BBBBBB"


def token_scales(edits: Sequence[tuple[list[str], Mapping[str, Tensor]]]) -> Figure:
    """Scale factors along the tokens of edits, a row for each matrix (figure 7a). White: the token has no gradient."""
    rows = len(edits[0][1])
    longest = max(len(tokens) for tokens, _ in edits)
    figure = Figure(
        figsize=(max(5.0, 0.34 * longest + 2.4), len(edits) * (0.3 * rows + 1.0)), layout="constrained", dpi=110
    )
    panels = figure.subplots(len(edits), 1, squeeze=False)[:, 0]
    for axes, (tokens, scale) in zip(panels, edits, strict=True):
        values = torch.stack(list(scale.values())).float().numpy()
        axes.imshow(values, vmin=0, vmax=1, cmap="Greens", aspect="auto")
        axes.set_yticks(range(rows), list(scale), fontsize=7)
        axes.set_xticks(range(len(tokens)), [shorten(t, 14) or "␣" for t in tokens], rotation=60, ha="right")
        for label in axes.get_xticklabels():
            label.set(fontsize=7, parse_math=False)
        axes.tick_params(length=0)
    figure.colorbar(
        ScalarMappable(Normalize(0, 1), "Greens"), ax=list(panels), label="share of the token's update", fraction=0.03
    )
    figure.suptitle("Which tokens get into the edit", fontsize=10)
    return figure


def latents_by_relation(latents: Mapping[str, Tensor], relations: Sequence[str]) -> Figure:
    """Latents [edits, l_m d_m] of each matrix by their first two principal components and relation (figure 6)."""
    common = [name for name, _ in Counter(relations).most_common(len(COLOURS))]
    figure = Figure(figsize=(3.4 * len(latents) + 0.4, 3.9), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(latents), squeeze=False)[0]
    for axes, (name, points) in zip(panels, latents.items(), strict=True):
        u, s, _ = torch.linalg.svd(points.float() - points.float().mean(0), full_matrices=False)
        at = (u[:, :2] * s[:2]).numpy()
        share = s.square() / s.square().sum().clamp(min=torch.finfo(s.dtype).tiny)
        for i, relation in enumerate([*common, None]):
            chosen = [j for j, r in enumerate(relations) if (r == relation if relation else r not in common)]
            if chosen:
                colour = COLOURS[i] if relation else OTHER
                axes.scatter(*at[chosen].T, s=14, color=colour, label=shorten(relation or "others", 24))
        axes.set_title(f"{name}\n({float(share[:2].sum()):.0%} of the variance)", fontsize=8)
        axes.tick_params(labelsize=7)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    figure.suptitle("Latents of edits, by relation", fontsize=10)
    return figure
