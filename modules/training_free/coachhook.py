"""COMEBA-HK (CoachHook): consecutive batches of edits in layers that stand in for the model's own, token by token.

Paper: "Consecutive Batch Model Editing with HooK Layers" (Li et al. 2024), sections 3.1 and 3.2. A hook layer W_h is
kept as its low-rank difference from W_0, in float32, so that |W_h x - W_0 x| is the norm of one term and float16 never
rounds what has gathered. Its outputs replace the layer's own at tokens that stand out: those whose z-score over the
sequence is at least alpha. Keys of earlier edits are remembered, which is the accumulated C_accu of equation 13 without
a matrix.

What differs from the released code: padding counts neither in means nor in deviations; while text is generated, a
token is judged by the statistics of the sequence up to and including it, so that decoding with a cache works (there, a
single token has no deviation and no hook ever fires); a short sequence, whose z-scores cannot exceed
(T - 1) / sqrt(T), is judged by a share of that bound where alpha is above it.

B rows, T tokens, n edits.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from datamodules.records import EditRequest
from datamodules.tokens import pad, pad_id
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import Deltas, LowRank, hooked, low_rank
from modules.training_free.closed_form import Metric, automatic_weight, solve
from modules.training_free.locate import LocatedEdited, layer_numbers
from modules.training_free.memit import LAYERS, MEMIT
from modules.training_free.second_moments import Moments
from modules.training_free.subject import row
from modules.training_free.templates import Contexts
from modules.training_free.values import ValueOptions

PEAK = "peak."  # before a layer's name: z-scores of the edits, in what is remembered


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

    def __post_init__(self) -> None:
        if not 0 < self.cover <= 1 or self.first < 0 or (self.short is not None and not 0 < self.short <= 1):
            raise ValueError(f"scope: cover and short must be in (0, 1], first not negative, got {self}")

    def threshold(self, peaks: Tensor | None) -> float:
        """Alpha after edits that reach these z-scores [n] (eq. 19); those that have none do not count."""
        peaks = peaks[peaks.isfinite()] if peaks is not None else None
        if not self.dynamic or peaks is None or not len(peaks):
            return self.alpha
        return min(self.alpha, float(torch.quantile(peaks.double(), 1 - self.cover)))


class Gate:
    """A validated hook layer: it adds a term to a layer's output at tokens that stand out (eq. 16 to 18).

    Args:
        alpha: tokens with this z-score or a higher one pass.
    """

    def __init__(self, term: LowRank, alpha: float, scope: Scope) -> None:
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
        known = counted & (variance > 1e-12 * mean.square())  # two tokens that differ, at least
        self.scores = torch.where(known, (norm - mean) / variance.sqrt().clamp(min=1e-300), -torch.inf)
        self.open = known & (self.scores >= self._needed())
        return (output + torch.where(self.open[..., None], change, 0)).to(output.dtype)

    def _needed(self) -> Tensor:
        """The z-score that passes in each row [B, 1]."""
        alpha = torch.full_like(self.count, self.alpha)
        if self.scope.short is None:
            return alpha
        bound = (self.count - 1) / self.count.clamp(min=1).sqrt()
        return torch.minimum(alpha, self.scope.short * bound)


class HookedEdited(LocatedEdited):
    """A backbone under hook layers."""

    editor: "CoachHook"

    def alphas(self) -> dict[str, float]:
        """The threshold of each layer, from what is remembered of the edits: taking one out takes it back."""
        return {name: self.editor.scope.threshold(self.memory.get(PEAK + name)) for name in self.terms}

    def gates(self) -> dict[str, Gate]:
        """Validated hook layers, for one sequence and what follows it."""
        alphas = self.alphas()
        return {name: Gate(term, alphas[name], self.editor.scope) for name, term in self.terms.items()}

    def applied(self) -> AbstractContextManager[None]:
        return gated(self.backbone, self.gates())

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        gates = state or self.gates()
        with gated(self.backbone, gates):
            return Edited.decode(self, ids, mask, **options)[0], gates

    def merge(self) -> Any:
        """Refused: whether a hook layer answers depends on the text."""
        raise ValueError(
            "the edits of coachhook are hook layers, which answer for some tokens only: no weights can hold them. "
            "Save the edits instead"
        )


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


class CoachHook(MEMIT):
    """Consecutive batch editing with hook layers. `edit` on an edited model is the next batch.

    Args:
        layers: the decoder layers, as numbers or parts of the depth; not the last of all.
        weight: lambda. Paper: 15,000 for consecutive batches, 5,000 for a single one; `auto` as of MEMIT.
        batch: edits of one call are made so many at a time (paper: 10, and 30 in a single round).
        scope: which tokens the hook layers answer for.
        values, contexts, moments: as of MEMIT.
    """

    name = "coachhook"
    edited = HookedEdited

    def __init__(
        self,
        layers: Sequence[int | float] = LAYERS,
        weight: float | Literal["auto"] = "auto",
        batch: int = 10,
        scope: Scope | None = None,
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
    ) -> None:
        super().__init__(layers, weight, values, contexts, moments)
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        self.batch = batch
        self.scope = scope or Scope()

    def factor(self, metric: Metric, keys: Tensor, earlier: Tensor | None) -> Tensor:
        weight = automatic_weight(keys.shape[1]) if self.weight == "auto" else self.weight
        return solve(metric, keys, weight, earlier)

    def remember(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        return keys

    def find(
        self, edited: LocatedEdited, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        backbone = edited.backbone
        if layer_numbers(backbone, self.layers)[-1] + 1 == len(backbone.layers):
            raise ValueError("coachhook.layers: hook layers must not stand in the last decoder layer")
        count, now = len(edited.requests), edited
        for at in range(0, len(requests), self.batch):
            group = requests[at : at + self.batch]
            found, keys = super().find(now, group)
            peaks = self.peaks(now.joined(group, found, keys), now, group)
            now = now.joined(group, found, keys | peaks)
        new = torch.arange(count, len(now.requests), device=backbone.device)
        return (
            {name: d.keep(new) for name, d in now.deltas.items()},
            {name: m[count:] for name, m in now.memory.items()},
        )

    def inserting(self, edited: LocatedEdited, found: dict[str, Deltas], left: Sequence[str]) -> ExitStack:
        """Temporary hook layers on those that have not got their new weights, validated ones on the others."""
        assert isinstance(edited, HookedEdited)
        alphas, count = edited.alphas(), len(edited.requests)
        done = {}
        for name, new in found.items():
            deltas = edited.deltas[name].then(new, count) if name in edited.deltas else new
            one = torch.zeros(count + len(new.a), dtype=torch.long, device=new.a.device)
            done[name] = Gate(deltas.term(1, one).compact(), alphas.get(name, self.scope.alpha), self.scope)
        with ExitStack() as both:
            both.enter_context(gated(edited.backbone, done))
            both.enter_context(low_rank(edited.backbone.model, {n: t for n, t in edited.terms.items() if n in left}))
            return both.pop_all()

    def peaks(self, edited: LocatedEdited, before: LocatedEdited, requests: Sequence[EditRequest]) -> dict[str, Tensor]:
        """The z-scores that new edits reach in each layer [n], under names of what is remembered.

        Args:
            edited, before: with the new edits, and without.
        """
        backbone = edited.backbone
        rows = [row(backbone, r.prompt, str(r.subject)) for r in requests]
        ids, mask = (t.to(backbone.device) for t in pad([r.ids for r in rows], pad_id(backbone.tokenizer)))
        at = torch.arange(len(rows), device=ids.device), torch.tensor([r.subject for r in rows], device=ids.device)
        found: dict[str, Tensor] = {}
        gates: dict[str, Gate] = {}
        for name, term in edited.terms.items():
            gates[name] = Gate(term, torch.inf, replace(self.scope, short=None))  # it judges, and replaces nothing
            with gated(backbone, gates):
                backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            scores = gates[name].scores
            found[PEAK + name] = (scores.amax(1) if self.scope.calibrate == "peak" else scores[at]).float()
            if self.scope.calibrate_on == "edited":
                known = [m[PEAK + name] for m in (before.memory, found) if PEAK + name in m]
                gates[name] = Gate(term, self.scope.threshold(torch.cat(known)), self.scope)
        return found
