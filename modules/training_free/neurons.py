"""Neurons beside the last FFN: what they add, where they are looked at, and the losses that they are tuned on.

x is the FFN's input, which is below all neurons, so a neuron changes nothing that another one sees; the way from the
FFN's output to the logits is a sum, a norm and the head.

N edits, P positions that predict a target token, m neurons of an edit, Q positions of memory, R rows, T tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datamodules.tokens import pad, pad_id
from modules.backbone import Backbone
from modules.hypernetwork.batch import Scored, padded
from modules.interventions import hooked, shape
from modules.losses import head_of, mean_per_row, token_cross_entropy


class Neurons(NamedTuple):
    """Neurons with any leading shape, [n] or [N, m].

    Args:
        k, b: weights [..., d] and bias [...] of the activation.
        u, c: those of what it gates, where the FFN is gated; else of width 0 and unused.
        v: what an awake neuron adds [..., d].
    """

    k: Tensor
    b: Tensor
    u: Tensor
    c: Tensor
    v: Tensor

    def activation(self, x: Tensor) -> Tensor:
        """Before the activation function: x [..., T, d] -> [..., T, n]."""
        return x @ self.k.mT + self.b[..., None, :]

    def __call__(self, x: Tensor, act: nn.Module, there: Tensor | None = None) -> Tensor:
        """What is added to the FFN's output [..., T, d]; `there` [..., 1, n] silences the others."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.k.dtype)
            awake = act(self.activation(x))
            if self.u.shape[-1]:
                awake = awake * (x @ self.u.mT + self.c[..., None, :])
            return (awake if there is None else awake * there) @ self.v


def ends(backbone: Backbone) -> tuple[int, int]:
    """Widths of what the last FFN takes and gives."""
    first, last = places(backbone)
    return shape(backbone.model, first)[0], shape(backbone.model, last)[1]


def places(backbone: Backbone) -> tuple[str, str]:
    """The last FFN's first and last linear layer."""
    parts = backbone.parts
    at = f"{parts.layers}.{len(backbone.layers) - 1}"
    return f"{at}.{parts.mlp[0]}", f"{at}.{parts.mlp[-1]}"


class Seen(NamedTuple):
    """What the last FFN takes and what the model ends in before its last norm, [R, T, d] each, and the mask [R, T]."""

    x: Tensor
    end: Tensor
    mask: Tensor


def look(backbone: Backbone, rows: Sequence[Sequence[int]]) -> Seen:
    """Run token ids through the model, right-padded."""
    found: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found["x"] = given[0]

    def keep_end(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found["end"] = given[0]

    ids, mask = (t.to(backbone.device) for t in pad(rows, pad_id(backbone.tokenizer)))
    norm = backbone.model.get_submodule(backbone.parts.norm)
    with torch.no_grad(), hooked(backbone.model, {places(backbone)[0]: keep}), norm.register_forward_pre_hook(keep_end):
        backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    wide = torch.promote_types(found["x"].dtype, torch.float32)
    return Seen(found["x"].to(wide), found["end"], mask)


def target_inputs(backbone: Backbone, rows: Sequence[Scored], chunk: int = 32) -> list[Tensor]:
    """What the last FFN takes at each row's positions that predict its target, [P, d] each; so many rows in a pass."""
    found = []
    for at in range(0, len(rows), chunk):
        some = rows[at : at + chunk]
        for x, row in zip(look(backbone, [row.ids for row in some]).x, some, strict=True):
            found.append(x[row.start - 1 : len(row.ids) - 1])
    return found


class LossWeights(NamedTuple):
    """See `TPatcher`."""

    activation: float
    memory: float
    silence: float
    gap: float
    top: int


class Queries(NamedTuple):
    """What neurons are tuned on.

    Args:
        x, end: see `Seen`, at the positions that predict a target token [N, P, d].
        labels: the tokens they are to predict [N, P].
        there: positions that an edit has [N, P].
        own: those that a neuron is to wake for [N, P, m].
    """

    x: Tensor
    end: Tensor
    labels: Tensor
    there: Tensor
    own: Tensor

    @classmethod
    def of(cls, backbone: Backbone, rows: Sequence[Scored], seen: Seen, per_token: bool) -> "Queries":
        device = seen.x.device
        ids, _, _ = (t.to(device) for t in padded(backbone.tokenizer, rows))
        size = torch.tensor([len(row.ids) - row.start for row in rows], device=device)
        at = torch.arange(int(size.max()), device=device)[None]  # [1, P]
        there = at < size[:, None]
        token = (torch.tensor([row.start for row in rows], device=device)[:, None] + at).clamp(max=ids.shape[1] - 1)
        row = torch.arange(len(rows), device=device)[:, None]
        each = torch.eye(at.shape[1], dtype=torch.bool, device=device)
        own = there[..., None] & (each if per_token else torch.ones_like(each[:, :1]))[None]
        return cls(seen.x[row, token - 1], seen.end[row, token - 1], ids[row, token], there, own)


def losses(
    weights: LossWeights, backbone: Backbone, neurons: Neurons, queries: Queries, memory: Tensor, act: nn.Module
) -> Tensor:
    """The loss of each edit [N]: its own, that of activation, and those of memory.

    Args:
        memory: [Q, d]; the queries of the other edits are added to it.
    """
    exists = queries.own.any(1)  # [N, m]
    patch = neurons(queries.x, act, exists[:, None].to(queries.x.dtype))
    norm = backbone.model.get_submodule(backbone.parts.norm)
    row, at = queries.there.nonzero(as_tuple=True)
    hidden = norm((queries.end[row, at] + patch[row, at]).to(queries.end.dtype))
    ce = token_cross_entropy(hidden, head_of(backbone.model), queries.labels[row, at])
    edit = mean_per_row(ce, row, len(queries.x))

    own = neurons.activation(queries.x)  # [N, P, m]
    mean = _mean(own, queries.own)  # [N, m]
    awake = _mean((-own).masked_fill(~queries.own, -torch.inf).exp(), queries.own)
    everything = torch.cat([memory, queries.x[queries.there]])  # [Q', d]
    mine = torch.cat([row.new_full((len(memory),), -1), row])[None, :, None] == row.new_tensor(
        range(len(queries.x))
    ).view(-1, 1, 1)
    m = neurons.activation(everything[None]).masked_fill(mine, -torch.inf)  # [N, Q', m]
    top = m.topk(min(weights.top, int((~mine[:, :, 0]).sum(1).min())), dim=1).values
    silent = (top - weights.silence).exp().mean(1) + (top - mean[:, None] - weights.gap).exp().mean(1)  # [N, m]
    per_neuron = weights.activation * awake + weights.memory * silent
    return edit + _mean(per_neuron[..., None], exists[..., None])[:, 0]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over dim 1 of [N, P, m] where it is true: [N, m]; 0 where it never is."""
    return (values * where).sum(1) / where.sum(1).clamp(min=1)
