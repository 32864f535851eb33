"""MEND: a small network turns the gradient of an edit into an edit that generalises and stays local.

Paper: arXiv 2110.11309 (Mitchell et al., ICLR 2022); where the released code or EasyEdit's differs, a switch says so.
n tokens, w = d_in + d_out, r rank.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.backbone import BackboneConfig
from modules.gradients import Factors
from modules.hypernetwork.batch import EditQueries
from modules.hypernetwork.module import EditedLayers, EditLoss, GradientEditor, HyperOptimizer
from modules.hypernetwork.network import Hypernetwork
from modules.interventions import Deltas


@dataclass
class MendConfig:
    """The hypernetwork (paper, section 3; defaults as released).

    Args:
        rank: of its layers' weights.
        hidden_layers: so many and one more.
        shared: layers of one shape share a network, and differ in a scale and a shift; else each has its own.
        normalise: give it features in units of their running deviations.
        edit_lr: where the learned step sizes start.
    """

    rank: int = 1920
    hidden_layers: int = 1
    shared: bool = True
    normalise: bool = True
    edit_lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.rank < 1 or self.hidden_layers < 0:
            raise ValueError(
                f"model.mend.rank must be at least 1 and hidden_layers at least 0, got {self.rank}, "
                f"{self.hidden_layers}"
            )


class ResidualLayer(nn.Module):
    """`x + max(0, scale (U V x + b) + shift)`: nothing but x at the start.

    Args:
        width: w.
        rank: of U V; at most w.
        modes: layers of the language model that share it, each with a scale and a shift; 0: there are none.
    """

    def __init__(self, width: int, rank: int, modes: int) -> None:
        super().__init__()
        rank = min(rank, width)
        self.down = nn.Parameter(torch.randn(rank, width))  # V
        self.up = nn.Parameter(torch.zeros(width, rank))  # U
        self.bias = nn.Parameter(torch.zeros(width))
        self.scale = nn.Parameter(torch.ones(modes, width)) if modes else None
        self.shift = nn.Parameter(torch.zeros(modes, width)) if modes else None

    def forward(self, x: Tensor, mode: int) -> Tensor:
        """x [n, w] of the layer with number `mode` among those that share this."""
        y = F.linear(F.linear(x, self.down), self.up, self.bias)
        if self.scale is not None and self.shift is not None:
            y = y * self.scale[mode] + self.shift[mode]
        return x + y.clamp(min=0)  # not relu, whose gradient at 0, the start, is 0


class MendNetwork(Hypernetwork):
    """Normalised tokens through residual layers; what comes out multiplies to the edit, with a learned step size.

    The edit is `W - rate Σ h̃ᵀ ũ`, gradient descent at the start. The released code adds, and has to learn a negative
    rate; nothing else depends on the sign.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: MendConfig) -> None:
        super().__init__(shapes, config.shared, config.normalise)
        names: dict[str, list[str]] = {}  # of those that share a network
        for name, key in self.key.items():
            names.setdefault(key, []).append(name)
        self.mode = {name: i for of in names.values() for i, name in enumerate(of)}
        self.layers = nn.ModuleDict(
            {
                key: nn.ModuleList(
                    ResidualLayer(sum(shapes[of[0]]), config.rank, len(of) if config.shared else 0)
                    for _ in range(config.hidden_layers + 1)
                )
                for key, of in names.items()
            }
        )
        self.edit_lr = nn.Parameter(torch.full((len(shapes),), config.edit_lr))

    def rates(self) -> list[nn.Parameter]:
        return [self.edit_lr]

    def transform(
        self, factors: Mapping[str, Factors], seeds: Tensor | None
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        deltas = {}
        for i, name in enumerate(self.shapes):
            x, edit = self.normalised(name, factors[name])
            for layer in self.layers[self.key[name]]:  # type: ignore[union-attr]
                x = layer(x, self.mode[name])
            h, u = x.split(self.shapes[name], dim=1)
            deltas[name] = Deltas(h, -self.edit_lr[i] * u, edit)
        return deltas, {}


class MEND(GradientEditor):
    """The trained editor of arXiv 2110.11309.

    Args:
        backbone: the language model to edit. It stays as it is loaded, also in precision: bfloat16 halves its memory
            while the hypernetwork trains in float32.
        layers: what of it is edited; by default the MLPs of the last three layers.
        mend: the hypernetwork.
        queries: what a record asks in training; by default a rephrase and a locality query.
        loss: the loss terms.
        optimizer: rates.
        calibration_records: training records that the statistics of factors begin with.
        gradient_checkpointing: recompute the layers above the lowest edited one in the backward pass.
        exact_match: also validate by generation.
        seed: of the hypernetwork's start.
    """

    method = "mend"

    def __init__(
        self,
        backbone: BackboneConfig,
        layers: EditedLayers | None = None,
        mend: MendConfig | None = None,
        queries: EditQueries | None = None,
        loss: EditLoss | None = None,
        optimizer: HyperOptimizer | None = None,
        calibration_records: int = 64,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone,
            layers,
            queries,
            loss,
            optimizer,
            calibration_records,
            gradient_checkpointing,
            exact_match,
            seed,
        )
        self.mend = mend or MendConfig()

    def network(self, shapes: Mapping[str, tuple[int, int]]) -> MendNetwork:
        return MendNetwork(shapes, self.mend)

    def settings(self) -> dict[str, Any]:
        return {"mend": asdict(self.mend)}

    @classmethod
    def of(cls, backbone: BackboneConfig, layers: EditedLayers, settings: dict[str, Any]) -> "MEND":
        return cls(backbone, layers, MendConfig(**settings["mend"]))
