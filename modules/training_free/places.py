"""Where the change of a value vector is added: at outputs of modules, at the subject's last token.

E edits, p places, R rows, S tokens from the subject's last one on, d hidden width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.backbone import Backbone
from modules.training_free.subject import Row, subject_states
from modules.training_free.value_options import Place


def initial_outputs(backbone: Backbone, rows: Sequence[Row], layer: int, place: Place) -> Tensor:
    """What stands now at the subjects' last tokens where a change would be added [E, p, d]."""
    names = place_names(backbone, layer, place)
    states = subject_states(backbone, rows, [], names)
    return torch.stack([states[name] for name in names], dim=1)


def place_names(backbone: Backbone, layer: int, place: Place) -> list[str]:
    """The modules whose outputs a change is added to."""
    stem = f"{backbone.parts.layers}.{layer}"
    down = f"{stem}.{backbone.parts.down}"
    return {"mlp": [down], "layer": [stem], "attention and mlp": [f"{stem}.{backbone.parts.attention}", down]}[place]


def add(x: Tensor, delta: Tensor) -> Tensor:
    """delta [R, d] at the first of the tokens [R, S, d], which is the subject's last."""
    return torch.cat([x[:, :1] + delta[:, None].to(x.dtype), x[:, 1:]], dim=1)


@contextmanager
def added(backbone: Backbone, place: Place, layer: int, delta: Tensor, edit: Tensor) -> Iterator[None]:
    """Changes at outputs inside of the first layer that runs, where they are not added before it."""
    names = place_names(backbone, layer, place)
    if place != "attention and mlp" and layer + 1 < len(backbone.layers):
        names = []

    def hook(i: int) -> Any:
        def adding(_: Any, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (add(output[0], delta[:, i][edit]), *output[1:])
            return add(output, delta[:, i][edit])

        return adding

    handles = [backbone.model.get_submodule(n).register_forward_hook(hook(i)) for i, n in enumerate(names)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
