"""A module's parameters, and what one of its training steps holds and multiplies, from a run without data.

N edits, B queries, T tokens.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from modules.gist.batch import GistBatch
from modules.trained import InComeS
from trainers.estimate.plan import Plan
from trainers.estimate.shape import shape_of
from trainers.estimate.weightless import Weightless


@dataclass(frozen=True)
class Part:
    """Numbers of parameters."""

    all: int
    trained: int


@dataclass(frozen=True)
class Counts:
    """The parameters of a module and its teacher.

    Args:
        parts: by what they are for.
        sizes: elements of each parameter of the module, frozen ones too.
        trained: elements that are trained.
        largest: elements of the largest trained parameter.
        bytes, trained_bytes: of the module, as it trains.
        outside: elements that stage 3 holds whole through a step: they are read outside their submodule.
        teacher: elements of the frozen copy; 0 where the teacher is the model itself.
        teacher_bytes: of that copy.
        teacher_head_bytes: of its output head, where that is not the embedding too.
        loaded_bytes: of model and teacher together, as they are loaded.
    """

    parts: dict[str, Part]
    sizes: tuple[int, ...]
    trained: int
    largest: int
    bytes: int
    trained_bytes: int
    outside: int
    teacher: int
    teacher_bytes: int
    teacher_head_bytes: int
    loaded_bytes: int


@dataclass(frozen=True)
class Step:
    """One micro-batch, forward and backward.

    Args:
        peak: bytes besides parameters at the step's largest moment, by what they are for.
        flops: of all multiplications, repeated ones too.
        tokens: positions of edits and queries, which the student reads.
    """

    peak: Counter[str]
    flops: int
    tokens: int


_known: dict[str, tuple[Counts, Step]] = {}


def measure(plan: Plan) -> tuple[Counts, Step]:
    """Build the plan's module and run its largest micro-batch, both without data: seconds, and no memory to speak of.
    Liger's kernels, which hold less, are left out.

    Raises:
        ValueError: where the backbone's shape cannot be had, or the module's settings exclude each other.
    """
    m = plan.module
    settings = (m.backbone_config, m.gist_config, m.queries, m.loss, m.lora, m.train_part, m.reader, m.teacher_dtype)
    keeps = plan.sharding.stage is None
    run = (
        m.gradient_checkpointing,
        plan.records,
        plan.cast,
        plan.autocast,
        plan.card.cpu,
        keeps,
        keeps and plan.accumulate > 1,
    )
    key = repr((settings, run))
    if key not in _known:
        with _built(plan) as (module, mode, counts):
            _known[key] = counts, _step(plan, module, mode, keeps)
    return _known[key]


def count(plan: Plan) -> Counts:
    """Only build the module.

    Raises:
        ValueError: as `measure` does.
    """
    with _built(plan) as (_, _, counts):
        return counts


@contextmanager
def _built(plan: Plan) -> Iterator[tuple[InComeS, Weightless, Counts]]:
    module = copy.deepcopy(plan.module)
    module.backbone_config = shape_of(module.backbone_config)
    module.__dict__.pop("tokenizer", None)  # the new source has one of its own, at hand anywhere
    # CUDA's fused kernels do not take a mask together with grouped keys
    mode = Weightless(fused=lambda masked, grouped: plan.card.cpu or not (masked and grouped))
    with warnings.catch_warnings(), patch.object(rank_zero_only, "rank", 1), mode:
        warnings.simplefilter("ignore")
        with mode.kind("parameters"):
            module.configure_model()
            loaded = _bytes(module.gists) + _bytes(module._outside.get("teacher"))
            if plan.cast is not None:
                module.gists.to(plan.cast)
        yield module, mode, _counts(module, loaded)


def _step(plan: Plan, module: InComeS, mode: Weightless, keeps: bool) -> Step:
    """Without DeepSpeed gradients stay with their parameters. They are there already in the forward pass, for Lightning
    drops the last step's after it. With DeepSpeed they go to its buffers one by one, which are counted elsewhere."""

    def arrived(p: Tensor) -> None:
        if keeps and p.grad is not None:
            mode.call(p.grad, "gradients")
        else:
            p.grad = None

    for p in module.gists.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(arrived)
            if keeps:
                with mode.kind("gradients"):
                    p.grad = torch.empty_like(p)
    teach = module._teach

    def taught(*args: object) -> object:
        with mode.kind("teacher's forward"):
            return teach(*args)  # type: ignore[arg-type]

    with mode.kind("batch"):
        batch = largest_batch(module, plan.records)
    mode.wide = int(module.gists.language_model.config.vocab_size)  # type: ignore[union-attr]
    mode.begin()
    with mode.kind("activations"), patch.object(module, "_teach", taught):
        with torch.autocast("cpu", plan.autocast or torch.bfloat16, enabled=plan.autocast is not None):
            loss = module.losses(batch, batch.visible)["loss"]
        if plan.accumulate == 1:
            module.zero_grad()
        torch.autograd.backward([loss])
    peak = Counter({kind: size for kind, size in mode.peak.items() if size and kind not in ("parameters", "other")})
    return Step(peak, mode.flops, batch.edits.numel() + batch.queries.numel())


def largest_batch(module: InComeS, records: int) -> GistBatch:
    """As many edits as records, padded to the longest edit, and their queries, padded to the longest query.

    A short edit leaves the most room for a query: the limit is on both together, with a line break between them.
    """
    limits = module.queries
    n, b = records, records * limits.per_record
    edit, query = limits.max_edit_tokens, limits.max_query_tokens - 2
    both = limits.max_query_tokens + query  # the teacher's row: edit and query, then the query alone

    def ids(rows: int, tokens: int) -> Tensor:
        return torch.ones(rows, tokens, dtype=torch.long)

    edits_mask, queries_mask, blocks = ids(n, edit), ids(b, query), ids(b, both)
    edits_mask[0, -1] = queries_mask[0, -1] = 0  # a batch without padding would need no mask
    blocks[:, -query:] = 2
    answer = torch.arange(query).expand(b, -1) >= min(query // 2, 12)
    return GistBatch(
        edits=ids(n, edit),
        edits_mask=edits_mask,
        queries=ids(b, query),
        queries_mask=queries_mask,
        golden=torch.arange(b) // limits.per_record,
        visible=torch.ones(b, n, dtype=torch.bool),
        answer=answer,
        teacher=ids(b, both),
        teacher_positions=torch.arange(both).expand(b, -1) % limits.max_query_tokens,
        teacher_blocks=blocks,
        with_edit=torch.full((b,), 2),
        alone=torch.full((b,), limits.max_query_tokens),
        records=["longest"] * n,
    )


def _counts(module: InComeS, loaded: int) -> Counts:
    model = module.gists
    language = model.language_model
    embedding, head = (_weights(part) for part in (language.get_input_embeddings(), language.get_output_embeddings()))
    parts: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if name.startswith("language_model."):
            low = "adapters" if "lora_" in name else "layers"
            part = "embeddings" if id(p) in embedding else "output head" if id(p) in head else low
        else:
            part = "gist token" if name == "gist_embedding" else "selection"
        parts.setdefault(part, []).append(p)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    teacher = module._outside.get("teacher")
    alone = 0
    if teacher is not None:
        inner = {id(p) for p in teacher.base_model.parameters()}
        alone = sum(p.nbytes for p in teacher.parameters() if id(p) not in inner)
    return Counts(
        parts={
            part: Part(sum(p.numel() for p in ps), sum(p.numel() for p in ps if p.requires_grad))
            for part, ps in parts.items()
        },
        sizes=tuple(p.numel() for p in parameters),
        trained=sum(p.numel() for p in trained),
        largest=max(p.numel() for p in trained),
        bytes=_bytes(model),
        trained_bytes=sum(p.nbytes for p in trained),
        outside=model.gist_embedding.numel() + sum(p.numel() for p in head.values()),
        teacher=sum(p.numel() for p in teacher.parameters()) if teacher is not None else 0,
        teacher_bytes=_bytes(teacher),
        teacher_head_bytes=alone,
        loaded_bytes=loaded,
    )


def _weights(part: object) -> dict[int, nn.Parameter]:
    return {id(p): p for p in part.parameters()} if isinstance(part, nn.Module) else {}


def _bytes(module: nn.Module | None) -> int:
    return sum(p.nbytes for p in module.parameters()) if module is not None else 0
