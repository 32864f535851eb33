"""MEMIT: many facts at once, spread over the down projections of several layers by ridge regression; and PMET.

Papers: arXiv 2210.07229 (Meng et al., ICLR 2023), sections 4.2 and 4.3; PMET: arXiv 2308.08742 (Li et al., AAAI 2024).
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
from torch import Tensor

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.interventions import Deltas, LowRank, low_rank
from modules.training_free.closed_form import Metric, automatic_weight, solve
from modules.training_free.held import Held
from modules.training_free.locate import LocatedEdited, LocateEditor, deltas_of, layer_numbers
from modules.training_free.metrics import Metrics
from modules.training_free.places import place_names
from modules.training_free.second_moments import Moments
from modules.training_free.subject import subject_states
from modules.training_free.templates import Contexts
from modules.training_free.value_options import Place, ValueOptions
from modules.training_free.values import find_values

LAYERS = (0.17, 0.2, 0.24, 0.27, 0.3)


class MEMIT(LocateEditor):
    """Mass-editing memory in a transformer. All edits of a call are made together; those of a further call know nothing
    of the earlier ones but the model they left.

    Args:
        layers: the decoder layers, as numbers or parts of the depth. Values are found at the last of them.
        weight: lambda, of the second moments against the new keys. `auto` is the number of the layer's inputs, which
            fits any model (see `closed_form.automatic_weight`).
        values: how value vectors are found.
        contexts: in which keys and values are taken.
        moments: second moments of the layers' inputs.
    """

    name = "memit"
    place: Place = "layer"
    spread: Literal["even", "root"] = "even"

    def __init__(
        self,
        layers: Sequence[int | float] = LAYERS,
        weight: float | Literal["auto"] = "auto",
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
    ) -> None:
        super().__init__(layers, contexts or Contexts(counts={10: 5}, bare_share=0.5))
        if weight != "auto" and weight < 0:
            raise ValueError(f"weight must not be negative, or auto, got {weight}")
        self.weight: float | Literal["auto"] = weight
        self.values = values or ValueOptions()
        self.metrics = Metrics(moments or Moments())

    def metric(self, backbone: Backbone, names: Sequence[str]) -> list[Metric]:
        """The metric of each layer."""
        return self.metrics.inverse(backbone, names)

    def factor(self, metric: Metric, keys: Tensor, earlier: Tensor | None) -> Tensor:
        """Input factors [n, f] of new edits; `earlier`: what is remembered of the keys of those before [m, f]."""
        return solve(metric, keys, automatic_weight(keys.shape[1]) if self.weight == "auto" else self.weight)

    def remember(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        """What later edits need to know of these keys, [n, f] by layer."""
        return {}

    def find(
        self, edited: LocatedEdited, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        backbone, names = edited.backbone, self.names(edited.backbone)
        metrics = self.metric(backbone, names)
        layers = layer_numbers(backbone, self.layers)
        at = place_names(backbone, layers[-1], self.place)[-1]  # of PMET's two places the MLP, which is what is edited
        prefixes = self.contexts.draw(backbone)
        with edited.applied():
            state = edited.state() if self.values.keep else None
            values = find_values(backbone, requests, prefixes, layers[-1], self.place, self.values, state)
        goal = values.initial[:, -1] + values.delta[:, -1]  # [n, d]
        rows, count = self.rows(backbone, requests), len(requests)
        bare = rows[:: len(rows) // count]
        found: dict[str, Deltas] = {}
        seen: dict[str, Tensor] = {}
        every, single = Held(), Held()  # what comes into the layer at hand: nothing below it changes any more
        for i, (name, metric) in enumerate(zip(names, metrics, strict=True)):
            every.layer = single.layer = layers[i]
            with self.inserting(edited, found, names[i:]):
                keys, _ = self.keys(backbone, rows, count, name, every)
                now = subject_states(backbone, bare, [], [at], held=single)[at]
            rest = len(names) - i
            residual = (goal - now) / (rest if self.spread == "even" else rest**0.5)
            found[name] = deltas_of(self.factor(metric, keys, edited.memory.get(name)), residual, residual.dtype)
            seen[name] = keys
        return found, self.remember(seen)

    def inserting(self, edited: LocatedEdited, found: dict[str, Deltas], left: Sequence[str]) -> ExitStack:
        """The model while values are inserted, layer by layer: under the edits and what is found of the new ones.

        Args:
            left: layers that have not got theirs yet.
        """
        with ExitStack() as both:
            both.enter_context(edited.applied())
            both.enter_context(low_rank(edited.backbone.model, terms_of(found)))
            return both.pop_all()


def terms_of(found: Mapping[str, Deltas]) -> dict[str, LowRank]:
    """Deltas of edits that count together, as one term for each layer."""
    return {n: d.term(1, torch.zeros(len(d.a), dtype=torch.long, device=d.a.device)) for n, d in found.items()}


class PMET(MEMIT):
    """PMET: changes of the last layer's attention and MLP outputs are found together, and only the MLP's is inserted,
    divided by the root of the layers that are left."""

    name = "pmet"
    place: Place = "attention and mlp"
    spread: Literal["even", "root"] = "root"
