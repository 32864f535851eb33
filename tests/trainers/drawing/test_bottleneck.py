"""The figures of bottlenecks."""

import torch

from trainers.drawing.bottleneck import latents_by_relation, token_scales


def test_figures() -> None:
    scale = {"1": torch.tensor([0.0, 0.5]), "2": torch.tensor([1.0, float("nan")])}
    figure = token_scales([(["Lyon", " $is_"], scale)] * 3)
    panel = figure.axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["Lyon", "$is_"]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["1", "2"]
    shown = panel.images[0].get_array()
    assert shown[:, 0].tolist() == [0.0, 1.0]
    assert panel.images[0].get_clim() == (0, 1)
    relations = [f"relation {i}" for i in range(9)] + ["relation 0"]
    figure = latents_by_relation({"1": torch.randn(10, 5), "2": torch.randn(10, 5)}, relations)
    groups = figure.axes[0].collections
    assert [len(g.get_offsets()) for g in groups] == [2, 1, 1, 1, 1, 1, 1, 1, 1]  # type: ignore[arg-type]
    assert groups[-1].get_label() == "others"
    for drawn in (token_scales([(["a", "b"], scale)]), figure):
        drawn.canvas.draw()
