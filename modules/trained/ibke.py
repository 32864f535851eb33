"""IBKE: the gradient of an edit squeezed through an information bottleneck, then made into an edit of weights.

Paper: arXiv 2512.16227 (Chen et al.), section IV; equations have its numbers. Nothing has been released: what the paper
leaves open has a default here, and configs/README.md lists it. Each edited matrix has a hypernetwork of its own.

B edits, T tokens, n tokens of all edits, w = d_in + d_out, l_m latent tokens of width d_m.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import sqrt
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from modules.backbone import BackboneConfig, Parts
from modules.gradients import Factors
from modules.hypernetwork.batch import EditQueries
from modules.hypernetwork.module import EditedLayers, EditLoss, GradientEditor, HyperOptimizer
from modules.hypernetwork.network import Hypernetwork
from modules.interventions import Deltas


@dataclass
class IbkeConfig:
    """The hypernetwork (paper, section IV-C).

    Args:
        latents: l_m, tokens of the latent representation (paper: 10).
        width: d_m, of the latent tokens and of all attention; not given in the paper.
        beta: weight of the information that latents carry (paper: 0.1; 1 for more generality).
        bottleneck: off, latents are their means: nothing is drawn, and their information costs nothing (figure 4, -IB).
        token_scale: off, all tokens count alike (figure 4, -SF).
        scaled_attention: divide attention's scores by the root of d_m; the paper's formula does not.
        normalise: give it features in units of their running deviations, as MEND does; not said in the paper.
        log_variance_bound: log-variances are squashed to below it, smoothly. A single token with extreme activations
            costs e to the power of hundreds else; not said in the paper.
        edit_lr: where the learned step sizes start; not given in the paper.
    """

    latents: int = 10
    width: int = 256
    beta: float = 0.1
    bottleneck: bool = True
    token_scale: bool = True
    scaled_attention: bool = True
    normalise: bool = True
    log_variance_bound: float = 4.0
    edit_lr: float = 1e-4

    def __post_init__(self) -> None:
        if self.latents < 1 or self.width < 1 or self.beta < 0 or self.log_variance_bound <= 0:
            raise ValueError(
                "model.ibke.latents and width must be at least 1, beta not negative and log_variance_bound positive, "
                f"got {self.latents}, {self.width}, {self.beta}, {self.log_variance_bound}"
            )


@dataclass
class IbkeLayers(EditedLayers):
    """Which linear layers are edited: by default the last projections of the MLPs of layers 6 to 8.

    Args:
        layers: numbers of decoder layers; negative ones count from the last.
        modules: names of linear layers within a layer, such as mlp.down_proj.
    """

    layers: list[int] = field(default_factory=lambda: [6, 7, 8])


@dataclass
class IbkeLoss(EditLoss):
    """The terms of the loss, by default those of equation 36; see `EditLoss`."""

    edit_weight: float = 1.0
    locality_on: Literal["all", "answer"] = "answer"
    locality_direction: Literal["forward", "reverse"] = "reverse"


class CrossAttention(nn.Module):
    """One head: what each of `x` reads of `y` (equation 28, with biases).

    Args:
        x_width, y_width: of the tokens that ask and of those that are read.
        width: d_m, of what comes out.
        scaled: divide scores by its root.
    """

    def __init__(self, x_width: int, y_width: int, width: int, scaled: bool) -> None:
        super().__init__()
        self.query = nn.Linear(x_width, width)
        self.key = nn.Linear(y_width, width)
        self.value = nn.Linear(y_width, width)
        self.scale = 1 / sqrt(width) if scaled else 1.0

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B or 1, L, x_width], y [B, T, y_width], mask [B, T]: tokens that may be read. Returns [B, L, d_m]."""
        scores = self.query(x) @ self.key(y).transpose(1, 2) * self.scale  # [B, L, T]
        if mask is not None:
            # not -inf: an edit without a token would get no number at all
            scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        return scores.softmax(-1) @ self.value(y)


class Seen(NamedTuple):
    """What the bottleneck of one matrix makes of edits.

    Args:
        mean, log_variance: of the latent tokens [B, l_m, d_m]; log_variance is None without a bottleneck.
        scale: how much of each token gets into the edit, 0 to 1 [B, T].
        transformed: tokens of the edit, residual and scale applied [B, T, w].
    """

    mean: Tensor
    log_variance: Tensor | None
    scale: Tensor
    transformed: Tensor

    def information(self) -> Tensor:
        """KL of the latents from the standard normal distribution, by element [B, l_m, d_m], in nats (equation 29)."""
        if self.log_variance is None:
            return torch.zeros_like(self.mean)
        return 0.5 * (self.log_variance.exp() + self.mean.square() - self.log_variance - 1)


class Bottleneck(nn.Module):
    """The hypernetwork of one matrix: edit tokens to latents (first stage), and back to edit tokens (second stage).

    Args:
        width: w.
    """

    def __init__(self, width: int, config: IbkeConfig) -> None:
        super().__init__()
        d, scaled = config.width, config.scaled_attention
        self.bound = config.log_variance_bound
        self.latents = nn.Parameter(torch.randn(config.latents, d))  # ζ
        self.mean = CrossAttention(d, width, d, scaled)
        self.log_variance = CrossAttention(d, width, d, scaled) if config.bottleneck else None
        self.read = CrossAttention(width, d, d, scaled)
        self.residual = nn.Linear(d, width)
        nn.init.zeros_(self.residual.weight)  # at the start an edit is gradient descent, as MEND's is
        nn.init.zeros_(self.residual.bias)
        self.scale = nn.Linear(d, 1) if config.token_scale else None

    def forward(self, s: Tensor, mask: Tensor, noise: Tensor | None = None) -> Seen:
        """s [B, T, w], mask [B, T], noise [B, l_m, d_m] (None: the mean is taken)."""
        latents = self.latents[None]
        mean = self.mean(latents, s, mask)  # equation 26
        log_variance = None
        if self.log_variance is not None:
            log_variance = self.bound * (self.log_variance(latents, s, mask) / self.bound).tanh()
        z = mean
        if log_variance is not None and noise is not None:
            z = mean + (log_variance / 2).exp() * noise  # equation 30
        read = self.read(s, z)  # equation 31
        scale = self.scale(read).sigmoid() if self.scale is not None else torch.ones_like(s[..., :1])
        return Seen(mean, log_variance, scale[..., 0], scale * (s + self.residual(read)))  # equation 32


class IbkeNetwork(Hypernetwork):
    """Normalised tokens through the bottleneck of their matrix; what comes out multiplies to the edit (equation 33)."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], config: IbkeConfig) -> None:
        super().__init__(shapes, shared=False, normalise=config.normalise)
        self.config = config
        self.bottlenecks = nn.ModuleDict({self.key[n]: Bottleneck(sum(s), config) for n, s in shapes.items()})
        self.edit_lr = nn.Parameter(torch.full((len(shapes),), config.edit_lr))

    def rates(self) -> list[nn.Parameter]:
        return [self.edit_lr]

    def transform(
        self, factors: Mapping[str, Factors], seeds: Tensor | None
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        deltas, information = {}, []
        noise = self._noise(seeds) if seeds is not None and self.config.bottleneck else {}
        for i, (name, seen, mask) in enumerate(self._look(factors, noise)):
            edit, at = mask.nonzero(as_tuple=True)
            h, u = seen.transformed[edit, at].split(self.shapes[name], dim=1)
            deltas[name] = Deltas(h, -self.edit_lr[i] * u, edit)
            information.append(seen.information().mean((1, 2)))
        if not self.config.bottleneck:
            return deltas, {}
        return deltas, {"information": self.config.beta * torch.stack(information).mean(0)}  # equation 36, last term

    @torch.no_grad()
    def look(self, factors: Mapping[str, Factors]) -> dict[str, tuple[Seen, Tensor]]:
        """What each bottleneck makes of edits outside of training, with the tokens [B, T] that take part."""
        return {name: (seen, mask) for name, seen, mask in self._look(factors, {})}

    def _look(self, factors: Mapping[str, Factors], noise: Mapping[str, Tensor]) -> list[tuple[str, Seen, Tensor]]:
        found = []
        for name in self.shapes:
            tokens, _ = self.normalised(name, factors[name])  # [n, w]
            mask = factors[name].mask
            s = tokens.new_zeros(*mask.shape, tokens.shape[1])
            s[mask] = tokens
            found.append((name, self.bottlenecks[self.key[name]](s, mask, noise.get(name)), mask))
        return found

    def _noise(self, seeds: Tensor) -> dict[str, Tensor]:
        """Standard normal numbers [B, l_m, d_m] by matrix, of each edit's own seed: the same on whatever rank it is."""
        shape = (len(self.shapes), self.config.latents, self.config.width)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds.tolist()]
        noise = torch.stack(drawn, 1).to(self.edit_lr)
        return dict(zip(self.shapes, noise, strict=True))


class IBKE(GradientEditor):
    """The trained editor of arXiv 2512.16227.

    Args:
        backbone: the language model to edit. It stays as it is loaded, also in precision: bfloat16 halves its memory
            while the hypernetwork trains in float32.
        layers: what of it is edited.
        ibke: the hypernetwork.
        queries: what a record asks in training; by default a query that follows from the edit and one that does not.
        loss: the loss terms.
        optimizer: rates.
        calibration_records: training records that the statistics of factors begin with.
        gradient_checkpointing: recompute the layers above the lowest edited one in the backward pass.
        exact_match: also validate by generation.
        seed: of the hypernetwork's start.
    """

    method = "ibke"

    def __init__(
        self,
        backbone: BackboneConfig,
        layers: IbkeLayers | None = None,
        ibke: IbkeConfig | None = None,
        queries: EditQueries | None = None,
        loss: IbkeLoss | None = None,
        optimizer: HyperOptimizer | None = None,
        calibration_records: int = 64,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone,
            layers or IbkeLayers(),
            queries,
            loss or IbkeLoss(),
            optimizer,
            calibration_records,
            gradient_checkpointing,
            exact_match,
            seed,
        )
        self.ibke = ibke or IbkeConfig()

    def edited_modules(self, parts: Parts) -> Sequence[str]:
        return (parts.down,)

    def network(self, shapes: Mapping[str, tuple[int, int]]) -> IbkeNetwork:
        return IbkeNetwork(shapes, self.ibke)

    def settings(self) -> dict[str, Any]:
        return {"ibke": asdict(self.ibke)}

    @classmethod
    def of(cls, backbone: BackboneConfig, layers: EditedLayers, settings: dict[str, Any]) -> "IBKE":
        return cls(backbone, IbkeLayers(layers.layers, layers.modules), IbkeConfig(**settings["ibke"]))
