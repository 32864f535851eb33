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

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.records import EditRequest
from datamodules.tokens import pad, pad_id
from modules.editor import Edited
from modules.interventions import Deltas, low_rank
from modules.training_free.closed_form import Metric, automatic_weight, solve
from modules.training_free.codebook import rounded
from modules.training_free.hook_layer import Gate, Scope, gated
from modules.training_free.locate import LocatedEdited, layer_numbers
from modules.training_free.memit import LAYERS, MEMIT
from modules.training_free.second_moments import Moments
from modules.training_free.subject import row
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions

PEAK = "peak."  # before a layer's name: z-scores of the edits, in what is remembered


class HookedEdited(LocatedEdited):
    """A backbone under hook layers."""

    editor: "CoachHook"

    @property
    def method(self) -> str:
        """With the unit of the scores that are remembered, which another scope would misread."""
        return f"{super().method}{' with scope.relative' if self.editor.scope.relative else ''}"

    def alphas(self) -> dict[str, float]:
        """The threshold of each layer, from what is remembered of the edits: taking one out takes it back."""
        scope, same = self.editor.scope, rounded(self.backbone)
        return {name: scope.threshold(self.memory.get(PEAK + name), same) for name in self.terms}

    def gates(self) -> dict[str, Gate]:
        """Validated hook layers, for one sequence and what follows it."""
        alphas = self.alphas()
        return {name: Gate(term, alphas[name], self.editor.scope) for name, term in self.terms.items()}

    def state(self, found: Mapping[str, Deltas] | None = None) -> str:
        deltas = super().state(found)  # which tokens they count at hangs on more
        return f"{deltas} {self.alphas()} {self.editor.scope}" if deltas else ""

    def applied(self) -> AbstractContextManager[None]:
        return gated(self.backbone, self.gates())

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        gates = state or self.gates()
        with gated(self.backbone, gates):
            return Edited.decode(self, ids, mask, **options)[0], gates

    def weight_changes(self) -> dict[str, Any]:
        """None: hook layers answer for some tokens only."""
        return {}

    @property
    def merge(self) -> Any:  # type: ignore[override]
        """There is none, and `hasattr` says so: whether a hook layer answers depends on the text."""
        raise AttributeError(
            "the edits of coachhook are hook layers, which answer for some tokens only: no weights can hold them. "
            "Save the edits instead"
        )


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
        names = list(edited.terms)
        after, same = self.scope.calibrate_on == "edited", rounded(backbone)
        gates: dict[str, Gate] = {}
        for group in [[name] for name in names] if after else [names]:  # layer by layer, or all of them in one pass
            # they judge, and replace nothing
            gates |= {n: Gate(edited.terms[n], torch.inf, replace(self.scope, short=None)) for n in group}
            with gated(backbone, gates):
                backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            for name in group:
                scores = gates[name].scores
                found[PEAK + name] = (scores.amax(1) if self.scope.calibrate == "peak" else scores[at]).float()
                if after:
                    known = [m[PEAK + name] for m in (before.memory, found) if PEAK + name in m]
                    gates[name] = Gate(edited.terms[name], self.scope.threshold(torch.cat(known), same), self.scope)
        return found
