"""ROME: one fact at a time, as a rank-one change of one down projection that gives the subject's key a new value.

Paper: arXiv 2202.05262 (Meng et al., NeurIPS 2022), section 3.1; R-ROME: arXiv 2403.07175 (Gupta et al. 2024).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from datamodules.records import EditRequest
from modules.interventions import Deltas, LowRank, low_rank
from modules.training_free.closed_form import Metric
from modules.training_free.locate import LocatedEdited, LocateEditor, deltas_of, layer_numbers
from modules.training_free.metrics import Metrics
from modules.training_free.second_moments import Moments
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions
from modules.training_free.values import find_values

Keys = Literal["released", "averaged", "prompt"]


class ROME(LocateEditor):
    """Rank-one model editing. Several edits are made one after another, each at the model as it is by then.

    Args:
        layer: the decoder layer, as a number or a part of the depth.
        values: how value vectors are found.
        contexts: in which keys and values are taken.
        moments: second moments of the layer's inputs, by which other inputs are kept as they are (paper and original
            code). None: all directions count the same (EasyEdit's setting for every model).
        keys: whose key gets the value. `averaged` over contexts throughout, as the paper has it and R-ROME restores
            it; `prompt`: the bare prompt's; `released`: averaged for the direction of the change, the bare prompt's for
            its size, as in the original code, which drifts apart in long runs of edits.
        batch: edits whose values are found together. 1 is the published method; more are faster, and each then knows
            nothing of the others of its batch but what they change at its own key.
    """

    name = "rome"

    def __init__(
        self,
        layer: int | float = 0.25,
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        keys: Keys = "released",
        batch: int = 1,
    ) -> None:
        super().__init__([layer], contexts or Contexts())
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.values = values or ValueOptions(clamp=4.0)
        self.key_kind: Keys = keys
        self.batch = batch
        self.metrics = Metrics(moments)

    def find(
        self, edited: LocatedEdited, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        backbone = edited.backbone
        (layer,), (name,) = layer_numbers(backbone, self.layers), self.names(backbone)
        metric = self.metrics.inverse(backbone, [name])[0]
        prefixes = self.contexts.draw(backbone)
        found: Deltas | None = None
        for at in range(0, len(requests), self.batch):
            group = requests[at : at + self.batch]
            terms = {name: found.term(1, torch.zeros(at, dtype=torch.long, device=found.a.device))} if found else {}
            with edited.applied(), low_rank(backbone.model, terms):
                state = edited.state({name: found} if found else {}) if self.values.keep else None
                values = find_values(backbone, group, prefixes, layer, "mlp", self.values, state)
                averaged, bare = self.keys(backbone, self.rows(backbone, group), len(group), name)
            key = bare if self.key_kind == "prompt" else averaged
            reached = key if self.key_kind == "averaged" else bare  # whose output must become the value
            a, b = rank_one(metric, key, reached, self._wanted(edited, values.delta[:, 0], averaged, bare, name, terms))
            more = deltas_of(a, b, values.delta.dtype)
            found = found.then(more, at) if found else more
        return {name: found} if found else {}, {}

    def _wanted(
        self,
        edited: LocatedEdited,
        delta: Tensor,
        averaged: Tensor,
        bare: Tensor,
        name: str,
        terms: Mapping[str, LowRank],
    ) -> Tensor:
        """By how much the output at the key must change [n, d]: the value is v0 + delta, v0 that of the bare prompt."""
        if self.key_kind != "averaged":
            return delta
        layer = edited.backbone.model.get_submodule(name)
        with edited.applied(), low_rank(edited.backbone.model, terms):
            dtype = next(layer.parameters()).dtype
            # one sequence, as a layer sees it, and its bias cancels
            now, then = (layer(k.to(dtype)[None])[0].to(delta.dtype) for k in (averaged, bare))
        return delta + then - now


class RROME(ROME):
    """R-ROME: the same key throughout."""

    name = "r_rome"

    def __init__(
        self,
        layer: int | float = 0.25,
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        keys: Literal["averaged", "prompt"] = "averaged",
        batch: int = 1,
    ) -> None:
        super().__init__(layer, values, contexts, moments, keys, batch)


def rank_one(metric: Metric, keys: Tensor, reached: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Rank-one changes b a', one after another: `reached` shall give `wanted` [n, d] more, in the direction of `keys`.

    Equation 2 of the paper with both the same; each edit counts in what those before it already changed at its key.

    Returns:
        a [n, f] and b [n, d], in float64.
    """
    moved, reached = metric(keys), reached.double()
    a = moved / (moved * reached).sum(-1, keepdim=True)
    b = wanted.double().clone()
    for i in range(1, len(a)):
        b[i] -= (a[:i] @ reached[i]) @ b[:i]
    return a, b
