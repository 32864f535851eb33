"""SERAC: a classifier and a counterfactual model are trained, beside the frozen language model that they stand in for.

N edits, Q queries, B readings, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from modules.serac.batch import SeracBatch
from modules.serac.encoder import EncoderConfig, package_folder, split_source
from modules.trained.serac import SERAC
from trainers.estimate.families.base import Family, half_backbone, shorter_chunk
from trainers.estimate.shape import shape_of

if TYPE_CHECKING:
    from trainers.estimate.plan import Plan
    from trainers.estimate.totals import Estimate


class Classified(Family):
    kind = SERAC
    frozen_name = "language model"

    def settings(self, module: SERAC) -> tuple[Any, ...]:
        m = module
        return m.backbone_config, m.counterfactual, m.scope, m.queries, m.loss, m.supervised

    def what(self, module: SERAC) -> object:
        return module.counterfactual, module.scope.encoder, module.supervised

    def shape(self, module: SERAC) -> None:
        super().shape(module)
        module.counterfactual = shape_of(module.counterfactual)
        module.scope = replace(module.scope, encoder=_shape_of(module.scope.encoder))

    def trained(self, module: SERAC) -> nn.Module:
        return module.serac

    def frozen(self, module: SERAC) -> PreTrainedModel:
        return module.serac.backbone.model

    def language_model(self, module: SERAC) -> PreTrainedModel:
        return module.serac.counterfactual.model

    def part(self, module: SERAC, name: str, parameter: nn.Parameter) -> str:
        return "scope classifier" if name.startswith("scope.") else "counterfactual model"

    def outside(self, module: SERAC) -> int:
        head: Any = self.language_model(module).get_output_embeddings()
        return sum(p.numel() for p in head.parameters())

    def batch(self, plan: Plan, module: SERAC) -> SeracBatch:
        """Edits and queries as long as the classifier reads, readings of the longest edit and the longest query."""
        limits, n = module.queries, plan.records
        each = self.queries(module)
        inside = (torch.arange(each) < limits.positives).repeat(n)  # [Q]
        record = torch.arange(n).repeat_interleave(each)
        answered = torch.arange(n * each) if not module.supervised else inside.nonzero()[:, 0]
        text = module.scope.encoder.max_tokens

        def ids(rows: int, tokens: int, answers: int = 0) -> tuple[Tensor, Tensor, Tensor]:
            mask = torch.ones(rows, tokens, dtype=torch.long)
            mask[0, -1] = 0  # a batch without padding would need no mask
            answer = torch.arange(tokens).expand(rows, -1) >= tokens - answers
            return torch.ones_like(mask), mask, answer

        scored = limits.max_query_tokens - min(limits.max_query_tokens // 2, 12)
        edits, edits_mask, _ = ids(n, text)
        queries, queries_mask, _ = ids(n * each, text)
        readings = ids(len(answered), limits.max_edit_tokens + limits.max_query_tokens, scored)
        plain = ids(len(answered), limits.max_query_tokens, scored)
        own = record[:, None] == torch.arange(n)[None]  # [Q, N]
        return SeracBatch(
            edits=edits,
            edits_mask=edits_mask,
            queries=queries,
            queries_mask=queries_mask,
            positive=(own & inside[:, None]) / limits.positives,
            negative=(own & ~inside[:, None]) / limits.negatives,
            readings=readings[0],
            readings_mask=readings[1],
            readings_answer=readings[2],
            plain=plain[0],
            plain_mask=plain[1],
            plain_answer=plain[2],
            own=torch.stack([answered, record[answered]], 1),
            share=torch.ones(len(answered)),
            in_scope=inside[answered],
            records=["longest"] * n,
        )

    def loss(self, module: SERAC, batch: SeracBatch) -> Tensor:
        return module.losses(batch)["loss"]

    def queries(self, module: SERAC) -> int:
        return module.queries.positives + module.queries.negatives

    def changes(self, found: Estimate) -> Iterator[tuple[str, Plan]]:
        plan = found.plan
        if plan.precision.startswith("32") and not plan.card.cpu:
            yield "--trainer.precision bf16-mixed", plan.altered(precision="bf16-mixed")
        yield from shorter_chunk(plan)
        yield from half_backbone(plan)


def _shape_of(config: EncoderConfig) -> EncoderConfig:
    """The same architecture and sizes as a `random:` source, whose model needs nothing to be read.

    Raises:
        ValueError: where the source's config cannot be had.
    """
    kind, name = split_source(config.source)
    if kind == "random":
        return config
    try:
        place = str(package_folder(name)) if kind == "package" else name
        found = AutoConfig.from_pretrained(place, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise ValueError(
            f"the shape of encoder {config.source!r} could not be had: {str(error)[:300]}\nGive --model.init_args."
            "scope.encoder.source a local folder with its config.json, or random:TYPE and its sizes as overrides."
        ) from error
    left_out = ("model_type", "dtype", "torch_dtype", "_name_or_path", "transformers_version")
    shape = {k: v for k, v in found.to_dict().items() if k not in left_out} | config.overrides
    return replace(config, source=f"random:{found.model_type}", overrides=shape)
