"""Hook layers of COMEBA-HK: which tokens they answer for, and how (see `coachhook.py`).

B rows, T tokens, n edits.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from modules.backbone import Backbone
from modules.interventions import Term, hooked


@dataclass
class Scope:
    """Which tokens a hook layer answers for.

    Args:
        alpha: the z-score to begin with. Paper: 2.2; 2 to 3 are much the same.
        dynamic: lower alpha to what the edits themselves reach (eq. 19); else it stays, which blocks nearly all edits.
        cover: share of the edits that must reach alpha. 1 as published: a single edit that does not stand out then
            opens the gate for everything.
        calibrate: an edit reaches the highest z-score of its prompt (`peak`, paper), or that of its subject's last
            token (`subject`), which is the one that has to pass.
        calibrate_on: activations of the unedited model (`original`, code), or of the edited one (`edited`), whose
            lower hook layers have replaced outputs by then, as they have when a prompt is answered.
        first: tokens at the beginning of a text that are never replaced and do not count. The first token of a text is
            often a huge outlier, whatever was edited. 0 as published.
        short: share of the highest z-score that a sequence's length allows, which a token of a short sequence needs;
            None as published: short prompts never pass.

        relative: scores are z-scores as shares of the highest that a sequence's length allows, (T - 1) / sqrt(T); alpha
            is such a share too. Plain z-scores, as published, let the shortest edited prompt decide: one of 5 tokens
            reaches 1.8 at most, alpha falls to that for all, and peaks of any longer text pass.

    Raises:
        ValueError: for a share outside (0, 1], or a negative number of tokens.
    """

    alpha: float = 2.2
    dynamic: bool = True
    cover: float = 1.0
    calibrate: Literal["peak", "subject"] = "peak"
    calibrate_on: Literal["original", "edited"] = "original"
    first: int = 0
    short: float | None = 0.95
    relative: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.cover <= 1 or self.first < 0 or (self.short is not None and not 0 < self.short <= 1):
            raise ValueError(f"scope: cover and short must be in (0, 1], first not negative, got {self}")

    def threshold(self, peaks: Tensor | None, same: float = 0.0) -> float:
        """Alpha after edits that reach these z-scores [n] (eq. 19); those that have none do not count.

        Args:
            same: the share by which a score may differ from batch to batch: the edit that decides alpha has to pass.
        """
        peaks = peaks[peaks.isfinite()] if peaks is not None else None
        if not self.dynamic or peaks is None or not len(peaks):
            return self.alpha
        reached = float(torch.quantile(peaks.double(), 1 - self.cover))
        return min(self.alpha, reached - same * abs(reached))


class Gate:
    """A validated hook layer: it adds a term to a layer's output at tokens that stand out (eq. 16 to 18).

    Args:
        alpha: tokens with this z-score or a higher one pass.
    """

    def __init__(self, term: Term, alpha: float, scope: Scope) -> None:
        self.term, self.alpha, self.scope = term, alpha, scope
        self.count = self.total = self.squares = torch.zeros(())  # of each row's tokens so far
        self.seen = torch.zeros(())
        self.real = torch.zeros(())  # mask of the tokens of this pass [B, T]
        self.scores = torch.zeros(())  # z-scores of the last pass [B, T]
        self.open = torch.zeros(())  # where it added its term [B, T]

    def begin(self, real: Tensor, more: bool) -> None:
        """A pass over tokens begins: mask [B, T] of the real ones; `more`: they follow those of the last pass."""
        if not more:
            self.count = self.total = self.squares = torch.zeros(len(real), 1, dtype=torch.float64, device=real.device)
            self.seen = torch.zeros(len(real), 1, dtype=torch.long, device=real.device)
        self.real = real

    def __call__(self, _: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        change = self.term(inputs[0])  # [B, T, d]
        norm = change.norm(dim=-1).double()  # [B, T]
        place = self.seen + self.real.cumsum(1)  # 1 for the first token of a text
        counted = self.real & (place > self.scope.first)
        self.seen = self.seen + self.real.sum(1, keepdim=True)
        self.count = self.count + counted.sum(1, keepdim=True)
        self.total = self.total + (norm * counted).sum(1, keepdim=True)
        self.squares = self.squares + (norm.square() * counted).sum(1, keepdim=True)
        mean = self.total / self.count.clamp(min=1)
        variance = (self.squares - self.count * mean.square()).clamp(min=0) / (self.count - 1).clamp(min=1)
        # of two tokens one always has the highest score that there can be, so that they say nothing
        known = counted & (self.count > 2) & (variance > 1e-12 * mean.square())
        self.scores = torch.where(known, (norm - mean) / variance.sqrt().clamp(min=1e-300), -torch.inf)
        if self.scope.relative:
            self.scores = self.scores / self._bound().clamp(min=1e-300)
        self.open = known & (self.scores >= self._needed())
        return (output + torch.where(self.open[..., None], change, 0)).to(output.dtype)

    def _needed(self) -> Tensor:
        """The score that passes in each row [B, 1]."""
        alpha = torch.full_like(self.count, self.alpha)
        if self.scope.short is None or self.scope.relative:
            return alpha
        return torch.minimum(alpha, self.scope.short * self._bound())

    def _bound(self) -> Tensor:
        """The highest z-score that each row's number of tokens allows [B, 1]."""
        return (self.count - 1) / self.count.clamp(min=1).sqrt()


@contextmanager
def gated(backbone: Backbone, gates: Mapping[str, Gate]) -> Iterator[None]:
    """Hook layers by name, for the length of a `with`. A pass with cached tokens goes on where the last one ended."""

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"]
        mask = kwargs["attention_mask"]
        for gate in gates.values():
            gate.begin(mask[:, -ids.shape[1] :].bool(), more=mask.shape[1] > ids.shape[1])

    handle = backbone.model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with hooked(backbone.model, dict(gates)):
            yield
    finally:
        handle.remove()
