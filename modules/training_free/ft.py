"""Fine-tuning of a few weights on the edits: FT-L, FT-M, and FT with the elastic net of EAC.

G changes (1, or one of each edit).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modules.backbone import Backbone
from modules.interventions import shape
from modules.training_free.locate import layer_numbers
from modules.training_free.shared import Layer
from modules.training_free.terms import Dense, Term
from modules.training_free.tuned import Change, Objective, TuningEditor


class DenseChange(Change):
    """A change D of each weight, from zero.

    Args:
        shapes: (d_in, d_out) by name.
        count: G.
        norm_constraint: no element of D may exceed this; None: any may.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], count: int, norm_constraint: float | None, device: torch.device
    ) -> None:
        self.names = list(shapes)
        self.norm_constraint = norm_constraint
        self.leaves = [torch.zeros(count, *size, device=device, requires_grad=True) for size in shapes.values()]

    def terms(self) -> dict[str, Term]:
        return {name: Dense(d) for name, d in zip(self.names, self.leaves, strict=True)}

    def step(self, gradients: Sequence[Tensor]) -> None:
        if self.norm_constraint is not None:
            for d in self.leaves:
                d.clamp_(-self.norm_constraint, self.norm_constraint)


@dataclass
class FTM(TuningEditor):
    """FT-M: the target's tokens, each predicted from those before it (Zhang et al., arXiv 2401.01286).

    Args:
        layers: numbers, from the end where negative, or fractions of the depth.
        modules: `down`: the MLP's last projection, as released; `mlp`: all of its linear layers. Biases stay.
        norm_constraint: the largest change of any one weight (Zhu et al., arXiv 2012.00363, with the max norm).
        steps, lr, stop_at, batch_size, seed: see `TuningEditor`; the start is zero and needs no seed.
    """

    layers: list[Layer] = field(default_factory=lambda: [0.7])
    modules: Literal["down", "mlp"] = "down"
    norm_constraint: float | None = None

    name: ClassVar[str] = "ft_m"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modules not in ("down", "mlp"):
            raise ValueError(f"{self.name}: modules must be down or mlp, got {self.modules!r}")
        if self.norm_constraint is not None and not self.norm_constraint > 0:
            raise ValueError(f"{self.name}: norm_constraint must be positive or null, got {self.norm_constraint}")

    def names(self, backbone: Backbone) -> list[str]:
        parts = backbone.parts
        of_layer = (parts.down,) if self.modules == "down" else parts.mlp
        numbers = layer_numbers(backbone, self.layers)
        return [f"{parts.layers}.{i}.{name}" for i in numbers for name in of_layer]

    def start(self, backbone: Backbone, count: int) -> Change:
        return DenseChange(self._shapes(backbone), count, self.norm_constraint, backbone.device)

    def _shapes(self, backbone: Backbone) -> dict[str, tuple[int, int]]:
        return {name: shape(backbone.model, name) for name in self.names(backbone)}


@dataclass
class FTL(FTM):
    """FT-L as released with ROME and by EasyEdit (`objective: prompt_last`): all tokens of the target are predicted at
    the prompt's last token. Of a target of several tokens that can only make a mixture, so its loss cannot go to 0."""

    name: ClassVar[str] = "ft_l"
    objective: ClassVar[Objective] = "prompt_last"


# ---------------------------------------------------------------------- with the elastic net


@dataclass
class ElasticNet:
    """The scored elastic net of EAC (Xu et al. 2025, equations 1 and 4 to 6) on the change of the weights.

    Args:
        l1: lambda, of the L1 norm in which an element's weight is `1 / (score + epsilon)`.
        l2: mu, of the squared L2 norm.
        score_steps: first passes over the edits, without the net, which make the scores: |mean gradient x change| of
            each element.
        epsilon: keeps the weights finite.
    """

    l1: float = 5e-7
    l2: float = 1e-3
    score_steps: int = 10
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if min(self.l1, self.l2) < 0 or self.score_steps < 1 or not self.epsilon > 0:
            raise ValueError(
                f"ft_eac: net.l1 and l2 must not be negative, score_steps at least 1 and epsilon positive; got {self}"
            )


class ElasticChange(DenseChange):
    """A change under the net. The L1 term acts as its proximal step, a shrinkage by `lr l1 weight` after each step of
    Adam, which would make a step of full size of any subgradient, however small; the L2 term is part of the loss."""

    def __init__(
        self,
        shapes: dict[str, tuple[int, int]],
        count: int,
        norm_constraint: float | None,
        device: torch.device,
        net: ElasticNet,
        lr: float,
    ) -> None:
        super().__init__(shapes, count, norm_constraint, device)
        self.net, self.lr = net, lr
        self.settled = False
        self.taken = 0
        self.gradients = [torch.zeros_like(d, requires_grad=False) for d in self.leaves]
        self.weights: list[Tensor] = []

    def penalty(self) -> Tensor:
        if not self.weights:
            return super().penalty()
        ones = [(w * d.detach().abs()).sum((1, 2)) for w, d in zip(self.weights, self.leaves, strict=True)]
        squares = [d.square().sum((1, 2)) for d in self.leaves]
        return self.net.l1 * torch.stack(ones).sum(0) + self.net.l2 * torch.stack(squares).sum(0)

    def step(self, gradients: Sequence[Tensor]) -> None:
        super().step(gradients)
        if not self.settled:
            self.taken += 1
            for total, gradient in zip(self.gradients, gradients, strict=True):
                total += gradient
        for d, weight in zip(self.leaves, self.weights, strict=False):
            d.copy_(d.sign() * (d.abs() - self.lr * self.net.l1 * weight).clamp(min=0))

    @torch.no_grad()
    def passed(self) -> None:
        super().passed()
        if self.passes == self.net.score_steps:
            self.settled = True
            for d, total in zip(self.leaves, self.gradients, strict=True):
                score = (total / self.taken * d).abs()
                self.weights.append(1 / (score + self.net.epsilon))
            self.gradients = []


@dataclass
class FTEAC(FTM):
    """FT with EAC's elastic net on the change of the weights (Xu et al. 2025, appendix E, which has no released code).

    The paper has nothing on how scores are made without a vector to edit: here by first steps without the net, as its
    first stage does for ROME and MEMIT, and the change goes on from there. `stop_at` looks at the whole loss.

    Args:
        net: the elastic net.
        prompt_last: the objective of FT-L in place of FT-M's.
    """

    net: ElasticNet = field(default_factory=ElasticNet)
    prompt_last: bool = False

    name: ClassVar[str] = "ft_eac"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps <= self.net.score_steps:
            raise ValueError(f"ft_eac: steps ({self.steps}) must exceed net.score_steps ({self.net.score_steps})")
        if self.prompt_last:
            self.objective = "prompt_last"  # type: ignore[misc]

    def start(self, backbone: Backbone, count: int) -> Change:
        shapes = self._shapes(backbone)
        return ElasticChange(shapes, count, self.norm_constraint, backbone.device, self.net, self.lr)
