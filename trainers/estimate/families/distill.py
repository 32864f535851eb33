"""DistillMIKE: adapters are trained; the teacher is the same model without them, and was asked before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from modules.distill.loss import Full, Taught, Top
from modules.distill.queries import DistillBatch, Question
from modules.trained import DistillMIKE
from trainers.estimate.families.base import Family, half_backbone, shorter_chunk

if TYPE_CHECKING:
    from trainers.estimate.plan import Plan
    from trainers.estimate.totals import Estimate

_REPHRASES = 2  # of a record, where the settings take all: CounterFact's number


@dataclass
class _Longest(DistillBatch):
    """A batch that also says that it has no edits: they are all in the adapters."""

    edits: Tensor


class _Answers:
    """Answers of the right shape for all of a batch's tokens."""

    def __init__(self, module: DistillMIKE, tokens: int) -> None:
        config: Any = module.student.language_model.config
        self.tokens, self.top_k = tokens, module.teaching.top_k
        self.hidden, self.vocabulary = int(config.hidden_size), int(config.vocab_size)
        self.dtype = module.backbone_config.torch_dtype

    def look_up(self, questions: Sequence[Question], device: torch.device) -> tuple[Taught, Tensor]:
        inside = torch.ones(len(questions), dtype=torch.bool)
        if self.top_k is None:
            return Full(torch.empty(self.tokens, self.hidden, dtype=self.dtype)), inside
        k = min(self.top_k, self.vocabulary)
        tokens = torch.zeros(self.tokens, k, dtype=torch.long)
        return Top(torch.empty(self.tokens, k), tokens, torch.empty(self.tokens)), inside


class Distillation(Family):
    """The edits that the student starts from are not counted: how many there are only the data can say. With N edits
    they are up to 4 N (d_in + d_out) bytes of each layer that the start changes, and never more than 4 d_in d_out."""

    kind = DistillMIKE
    frozen_name = "teacher"

    def settings(self, module: DistillMIKE) -> tuple[Any, ...]:
        m = module
        return m.backbone_config, m.queries, m.loss, m.adapters, m.teaching.top_k

    def what(self, module: DistillMIKE) -> object:
        return module.adapters

    def trained(self, module: DistillMIKE) -> nn.Module:
        return module.student

    def frozen(self, module: DistillMIKE) -> PreTrainedModel | None:
        return None

    def language_model(self, module: DistillMIKE) -> PreTrainedModel:
        return module.student.language_model

    def part(self, module: DistillMIKE, name: str, parameter: nn.Parameter) -> str:
        language = self.language_model(module)
        ends = {"embeddings": language.get_input_embeddings(), "output head": language.get_output_embeddings()}
        for part, end in ends.items():
            if any(parameter is p for p in end.parameters()):  # type: ignore[union-attr]
                return part
        return "adapters" if "lora_" in name else "layers"

    def outside(self, module: DistillMIKE) -> int:
        head: Any = self.language_model(module).get_output_embeddings()
        return sum(p.numel() for p in head.parameters())

    def batch(self, plan: Plan, module: DistillMIKE) -> DistillBatch:
        """All questions of so many records, each of the longest."""
        each, tokens = self.queries(module), module.queries.max_query_tokens
        rows = plan.records * each
        mask = torch.ones(rows, tokens, dtype=torch.long)
        mask[0, -1] = 0  # a batch without padding would need no mask
        answer = torch.arange(tokens).expand(rows, -1) >= min(tokens // 2, 12)
        record = torch.arange(plan.records).repeat_interleave(each)
        questions, none = [Question("", "")] * rows, torch.empty(0, dtype=torch.long)
        answer = answer & mask.bool()
        return _Longest(
            torch.ones_like(mask),
            mask,
            answer,
            record,
            questions,
            ["longest"] * plan.records,
            [(0, rows, tokens)],
            none,
        )

    def loss(self, module: DistillMIKE, batch: DistillBatch) -> Tensor:
        module.answered = _Answers(module, int(batch.queries_answer.sum()))  # type: ignore[assignment]
        return module.losses(batch)["loss"]

    def queries(self, module: DistillMIKE) -> int:
        asked = module.queries
        prompts = 1 + (_REPHRASES if asked.rephrases is None else asked.rephrases) + asked.locality
        every = prompts * (2 if asked.both_targets else 1)
        return every if asked.per_record is None else min(every, asked.per_record)

    def changes(self, found: Estimate) -> Iterator[tuple[str, Plan]]:
        plan = found.plan
        yield from shorter_chunk(plan)
        if plan.compute == torch.float32 and not plan.card.cpu:
            yield "--trainer.precision bf16-mixed", plan.altered(precision="bf16-mixed")
        yield from half_backbone(plan)
