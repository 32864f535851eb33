"""InComeS: the language model itself is trained, beside a frozen teacher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modules.gist.batch import GistBatch
from modules.trained import InComeS
from trainers.estimate.families.base import MODEL, Family

if TYPE_CHECKING:
    from trainers.estimate.plan import Plan
    from trainers.estimate.totals import Estimate
    from trainers.estimate.weightless import Weightless


class Gists(Family):
    kind = InComeS
    frozen_name = "teacher"

    def settings(self, module: InComeS) -> tuple[Any, ...]:
        m = module
        return m.backbone_config, m.gist_config, m.queries, m.loss, m.lora, m.train_part, m.reader, m.teacher_dtype

    def what(self, module: InComeS) -> object:
        return module.train_part

    def trained(self, module: InComeS) -> nn.Module:
        return module.gists

    def frozen(self, module: InComeS) -> PreTrainedModel | None:
        return module._outside.get("teacher")

    def language_model(self, module: InComeS) -> PreTrainedModel:
        return module.gists.language_model  # type: ignore[return-value]

    def part(self, module: InComeS, name: str, parameter: nn.Parameter) -> str:
        if not name.startswith("language_model."):
            return "gist token" if name == "gist_embedding" else "selection"
        language = self.language_model(module)
        for part, ends in {
            "embeddings": language.get_input_embeddings(),
            "output head": language.get_output_embeddings(),
        }.items():
            if any(parameter is p for p in ends.parameters()):  # type: ignore[union-attr]
                return part
        return "adapters" if "lora_" in name else "layers"

    def outside(self, module: InComeS) -> int:
        head: Any = self.language_model(module).get_output_embeddings()
        return module.gists.gist_embedding.numel() + sum(p.numel() for p in head.parameters())

    def batch(self, plan: Plan, module: InComeS) -> GistBatch:
        """As many edits as records, padded to the longest edit, and their queries, padded to the longest query.

        A short edit leaves the most room for a query: the limit is on both together, with a line break between them.
        """
        limits, n = module.queries, plan.records
        b = n * limits.per_record
        edit, query = limits.max_edit_tokens, limits.max_query_tokens - 2
        both = limits.max_query_tokens + query  # the teacher's row: edit and query, then the query alone

        def ids(rows: int, tokens: int) -> Tensor:
            return torch.ones(rows, tokens, dtype=torch.long)

        edits_mask, queries_mask, blocks = ids(n, edit), ids(b, query), ids(b, both)
        edits_mask[0, -1] = queries_mask[0, -1] = 0  # a batch without padding would need no mask
        blocks[:, -query:] = 2
        return GistBatch(
            edits=ids(n, edit),
            edits_mask=edits_mask,
            queries=ids(b, query),
            queries_mask=queries_mask,
            golden=torch.arange(b) // limits.per_record,
            visible=torch.ones(b, n, dtype=torch.bool),
            answer=torch.arange(query).expand(b, -1) >= min(query // 2, 12),
            teacher=ids(b, both),
            teacher_positions=torch.arange(both).expand(b, -1) % limits.max_query_tokens,
            teacher_blocks=blocks,
            with_edit=torch.full((b,), 2),
            alone=torch.full((b,), limits.max_query_tokens),
            records=["longest"] * n,
        )

    def watched(self, module: InComeS, batch: GistBatch, mode: Weightless) -> AbstractContextManager[Any]:
        return patch.object(module, "_teach", mode.counted(module._teach, "teacher's forward"))

    def loss(self, module: InComeS, batch: GistBatch) -> Tensor:
        return module.losses(batch, batch.visible)["loss"]

    def queries(self, module: InComeS) -> int:
        return module.queries.per_record

    def changes(self, found: Estimate) -> Iterator[tuple[str, Plan]]:
        plan, module = found.plan, found.plan.module
        if found.counts.frozen_bytes == 4 * found.counts.frozen > 0 and module.reader == "student":
            yield f"{MODEL}teacher_dtype bfloat16", plan.altered(teacher_dtype="bfloat16")
        if plan.compute == torch.float32 and not plan.card.cpu:
            yield "--trainer.precision bf16-mixed", plan.altered(precision="bf16-mixed")
        if module.train_part != "lora":
            lora: dict[str, Any] = {"train_part": "lora"}
            arguments = f"{MODEL}train lora"
            if module.reader == "original" and module.gradient_checkpointing:
                lora["gradient_checkpointing"] = False
                arguments += f" {MODEL}gradient_checkpointing false"
            yield arguments, plan.altered(**lora)
