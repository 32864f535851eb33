"""MEND and IBKE: a hypernetwork is trained, beside the frozen language model that it edits.

N edits, B queries, T tokens, n tokens of all edits, w = d_in + d_out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modules.gradients import Factors
from modules.hypernetwork.batch import EditBatch
from modules.hypernetwork.module import GradientEditor
from modules.hypernetwork.statistics import RunningStatistics
from modules.interventions import Deltas, LowRank
from trainers.estimate.families.base import MODEL, Family, half_backbone, shorter_chunk

if TYPE_CHECKING:
    from trainers.estimate.plan import Plan
    from trainers.estimate.totals import Estimate
    from trainers.estimate.weightless import Weightless

_SIZE = {"mend": "rank", "ibke": "width"}  # by method: the setting that its hypernetwork's size goes with


class Hypernetworks(Family):
    kind = GradientEditor
    frozen_name = "language model"

    def settings(self, module: GradientEditor) -> tuple[Any, ...]:
        return type(module), module.settings(), module.backbone_config, module.layers, module.queries, module.loss

    def what(self, module: GradientEditor) -> object:
        return module.settings()

    def trained(self, module: GradientEditor) -> nn.Module:
        return module.deltas

    def frozen(self, module: GradientEditor) -> PreTrainedModel:
        return module.deltas.backbone.model

    def language_model(self, module: GradientEditor) -> PreTrainedModel:
        return self.frozen(module)

    def part(self, module: GradientEditor, name: str, parameter: nn.Parameter) -> str:
        rates = module.deltas.network.rates()
        return "step sizes" if any(parameter is rate for rate in rates) else "hypernetwork"

    def batch(self, plan: Plan, module: GradientEditor) -> EditBatch:
        """As many edits as records in pools of the largest size, and their queries, all of the longest.

        A record of several edits, or with hops that are edited too, brings more: how many, only the data can say.
        """
        limits, n = module.queries, plan.records
        each = self.queries(module)
        b, edit, query = n * each, limits.max_edit_tokens, limits.max_query_tokens
        pool = torch.arange(n) // plan.pool

        def ids(rows: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
            mask = torch.ones(rows, tokens, dtype=torch.long)
            mask[0, -1] = 0  # a batch without padding would need no mask
            answer = torch.arange(tokens).expand(rows, -1) >= min(tokens // 2, 12)
            return torch.ones_like(mask), mask, answer & mask.bool()

        edits, edits_mask, edits_answer = ids(n, edit)
        queries, queries_mask, queries_answer = ids(b, query)
        return EditBatch(
            edits=edits,
            edits_mask=edits_mask,
            edits_answer=edits_answer,
            edit_pool=pool,
            edit_seed=torch.arange(n),
            queries=queries,
            queries_mask=queries_mask,
            queries_answer=queries_answer,
            query_pool=pool.repeat_interleave(each),
            in_scope=(torch.arange(each) < limits.generality).repeat(n),
            pools=int(pool[-1]) + 1,
            records=["longest"] * n,
        )

    def watched(self, module: GradientEditor, batch: EditBatch, mode: Weightless) -> AbstractContextManager[Any]:
        found = module._factors

        def factors(of: EditBatch) -> tuple[dict[str, Factors], Tensor]:
            # without data no gradient says which tokens take part: all of them may
            by_name, losses = found(of)
            return {name: f._replace(mask=of.edits_mask.bool()) for name, f in by_name.items()}, losses

        network = module.deltas.network
        watching = ExitStack()
        for owner, name, does, kind in [
            (module, "_factors", factors, "gradient factors"),
            (network, "transform", network.transform, "hypernetwork"),
            (Deltas, "term", Deltas.term, "low-rank terms"),
            (LowRank, "__getitem__", LowRank.__getitem__, "low-rank terms"),
            (RunningStatistics, "observe", _observe, "statistics"),
        ]:
            watching.enter_context(patch.object(owner, name, mode.counted(does, kind)))
        return watching

    def loss(self, module: GradientEditor, batch: EditBatch) -> Tensor:
        return module.losses(batch, training=True)["loss"]

    def queries(self, module: GradientEditor) -> int:
        return module.queries.generality + module.queries.locality

    def changes(self, found: Estimate) -> Iterator[tuple[str, Plan]]:
        plan, module = found.plan, found.plan.module
        yield from shorter_chunk(plan)
        yield from half_backbone(plan)
        if (size := _SIZE.get(module.method)) is not None:
            options = getattr(module, module.method)
            for share in (2, 4, 8):
                smaller = max(1, getattr(options, size) // share)
                changed = {module.method: replace(options, **{size: smaller})}
                yield f"{MODEL}{module.method}.{size} {smaller}", plan.altered(**changed)


def _observe(statistics: RunningStatistics, x: Tensor) -> None:
    """The tensors of `observe`, all tokens being finite."""
    about = (x.double() - statistics.mean)[torch.ones(len(x), dtype=torch.bool)]
    statistics._observed = torch.cat([about.new_zeros(1), about.sum(0), about.square().sum(0)])
