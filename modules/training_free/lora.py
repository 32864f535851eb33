"""LoRA as an editor: low-rank factors on the attention's projections, tuned on the edits.

No adapter is put into the model: the factors are terms like any other edit's, so nothing is left behind. There is no
dropout, which a handful of steps on one sentence has no use for (EasyEdit: 0.1).

G changes, r rank.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from modules.backbone import Backbone
from modules.interventions import LowRank, shape
from modules.training_free.locate import layer_numbers
from modules.training_free.shared import Layer
from modules.training_free.terms import Term
from modules.training_free.tuned import Change, TuningEditor

ORTHOGONALITY = 0.5  # weight of AdaLoRA's regulariser, peft's default


class Factors(Change):
    """`(x Aᵀ) B scale`: A at random, B zero (Hu et al., arXiv 2106.09685, section 4.1).

    Args:
        shapes: (d_in, d_out) by name.
        count: G; all start alike, so that a single edit is the same among others.
        scale: alpha / r.
        seed: of A.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], count: int, rank: int, scale: float, seed: int, device: torch.device
    ) -> None:
        self.names, self.scale = list(shapes), scale
        draw = torch.Generator().manual_seed(seed)
        self.a, self.b = [], []
        for d_in, d_out in shapes.values():
            a, b = self.first(draw, rank, d_in, d_out)
            self.a.append(a.to(device).repeat(count, 1, 1).requires_grad_())
            self.b.append(b.to(device).repeat(count, 1, 1).requires_grad_())
        self.leaves = [*self.a, *self.b]

    @staticmethod
    def first(draw: torch.Generator, rank: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
        bound = 1 / math.sqrt(d_in)
        return torch.empty(rank, d_in).uniform_(-bound, bound, generator=draw), torch.zeros(rank, d_out)

    def terms(self) -> dict[str, Term]:
        return {name: LowRank(a, b * self.scale) for name, a, b in zip(self.names, self.a, self.b, strict=True)}

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Nothing constrains the factors."""


class SingularFactors(Factors):
    """`(x Aᵀ) diag(e) B scale`, e zero, with A and B kept orthogonal by a penalty (AdaLoRA, arXiv 2303.10512).

    All r singular values stay: EasyEdit never calls the schedule that would prune them, and neither does an edit of so
    few steps.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], count: int, rank: int, scale: float, seed: int, device: torch.device
    ) -> None:
        super().__init__(shapes, count, rank, scale, seed, device)
        self.e = [torch.zeros(count, rank, 1, device=device, requires_grad=True) for _ in shapes]
        self.leaves += self.e

    @staticmethod
    def first(draw: torch.Generator, rank: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
        return 0.02 * torch.randn(rank, d_in, generator=draw), 0.02 * torch.randn(rank, d_out, generator=draw)

    def terms(self) -> dict[str, Term]:
        each = zip(self.names, self.a, self.b, self.e, strict=True)
        return {name: LowRank(a, b * e * self.scale) for name, a, b, e in each}

    def penalty(self) -> Tensor:
        norms = []
        for p in (*self.a, *self.b):  # [G, r, d]
            norms.append(torch.linalg.matrix_norm(p @ p.mT - torch.eye(p.shape[1], device=p.device)))
        return ORTHOGONALITY * torch.stack(norms).mean(0)


@dataclass
class LoRA(TuningEditor):
    """LoRA on the edits' target tokens (EasyEdit's baseline).

    Args:
        rank, alpha: the factors' product is scaled by alpha / rank.
        targets: `qv` (EasyEdit) or `qk` (what InComeS says of its baseline); where the model has one layer for queries,
            keys and values, all of it.
        layers: numbers, or fractions of the depth; null: all.
        adalora: the parametrisation of AdaLoRA at a fixed rank, which EasyEdit takes by default (there with rank 12
            whatever its config says, since peft's AdaLoRA reads `init_r`). Its penalty counts for `stop_at`.
        steps, lr, stop_at, batch_size, seed: see `TuningEditor`; EasyEdit never stops.
    """

    steps: int = 30
    lr: float = 5e-3
    rank: int = 8
    alpha: float = 32.0
    targets: Literal["qv", "qk"] = "qv"
    layers: list[Layer] | None = None
    adalora: bool = False

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"lora: rank must be at least 1 and alpha positive, got {self.rank}, {self.alpha}")
        if self.targets not in ("qv", "qk"):
            raise ValueError(f"lora: targets must be qv or qk, got {self.targets!r}")

    def names(self, backbone: Backbone) -> list[str]:
        depth, parts = len(backbone.layers), backbone.parts
        numbers = range(depth) if self.layers is None else layer_numbers(backbone, self.layers)
        of_layer = [f"{x}_proj" for x in self.targets] if hasattr(backbone.attention(0), "q_proj") else [parts.keys]
        return [f"{parts.layers}.{i}.{parts.attention}.{name}" for i in numbers for name in of_layer]

    def start(self, backbone: Backbone, count: int) -> Change:
        shapes = {name: shape(backbone.model, name) for name in self.names(backbone)}
        kind = SingularFactors if self.adalora else Factors
        return kind(shapes, count, self.rank, self.alpha / self.rank, self.seed, backbone.device)
