"""A module's parameters, and what one of its training steps holds and multiplies, from a run without data.

N edits, B queries, T tokens.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from trainers.estimate.families import Family
from trainers.estimate.plan import Plan
from trainers.estimate.weightless import Weightless


@dataclass(frozen=True)
class Part:
    """Numbers of parameters."""

    all: int
    trained: int


@dataclass(frozen=True)
class Counts:
    """The parameters of a module and of the frozen language model beside it.

    Args:
        parts: by what they are for.
        sizes: elements of each parameter of the module, frozen ones too.
        trained: elements that are trained.
        largest: elements of the largest trained parameter.
        bytes, trained_bytes: of the module, as it trains.
        outside: elements that stage 3 holds whole through a step: they are read outside their submodule.
        frozen: elements of the frozen language model beside the module; 0 where there is none, as where the teacher is
            the model itself.
        frozen_bytes: of that model.
        frozen_head_bytes: of its output head, where that is not the embedding too.
        loaded_bytes: of both together, as they are loaded.
        buffers: bytes of the module's, such as running statistics.
        frozen_name: what the frozen model is for.
    """

    parts: dict[str, Part]
    sizes: tuple[int, ...]
    trained: int
    largest: int
    bytes: int
    trained_bytes: int
    outside: int
    frozen: int
    frozen_bytes: int
    frozen_head_bytes: int
    loaded_bytes: int
    buffers: int = 0
    frozen_name: str = "teacher"


@dataclass(frozen=True)
class Step:
    """One micro-batch, forward and backward.

    Args:
        peak: bytes besides parameters at the step's largest moment, by what they are for.
        flops: of all multiplications, repeated ones too.
        wide_flops: those of them that are of 32 bits or more.
        tokens: positions of edits and queries.
    """

    peak: Counter[str]
    flops: int
    wide_flops: int
    tokens: int


_known: dict[str, tuple[Counts, Step]] = {}


def measure(plan: Plan) -> tuple[Counts, Step]:
    """Build the plan's module and run its largest micro-batch, both without data: seconds, and no memory to speak of.
    Liger's kernels, which hold less, are left out.

    Raises:
        ValueError: where the backbone's shape cannot be had, or the module's settings exclude each other.
    """
    settings = plan.family.settings(plan.module)
    keeps = plan.sharding.stage is None
    run = (
        plan.module.gradient_checkpointing,
        plan.records,
        plan.pool,
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
def _built(plan: Plan) -> Iterator[tuple[Any, Weightless, Counts]]:
    module = copy.deepcopy(plan.module)
    plan.family.shape(module)
    module.__dict__.pop("tokenizer", None)  # the new source has one of its own, at hand anywhere
    # CUDA's fused kernels do not take a mask together with grouped keys
    mode = Weightless(fused=lambda masked, grouped: plan.card.cpu or not (masked and grouped))
    with warnings.catch_warnings(), patch.object(rank_zero_only, "rank", 1), mode:
        warnings.simplefilter("ignore")
        with mode.kind("parameters"):
            module.configure_model()
            trained = plan.family.trained(module)
            loaded = _bytes(trained) + _bytes(plan.family.frozen(module))
            if plan.cast is not None:
                trained.to(plan.cast)
        yield module, mode, _counts(plan.family, module, loaded)


def _step(plan: Plan, module: Any, mode: Weightless, keeps: bool) -> Step:
    """Without DeepSpeed gradients stay with their parameters. They are there already in the forward pass, for Lightning
    drops the last step's after it. With DeepSpeed they go to its buffers one by one, which are counted elsewhere."""

    def arrived(p: Tensor) -> None:
        if keeps and p.grad is not None:
            mode.call(p.grad, "gradients")
        else:
            p.grad = None

    family = plan.family
    for p in family.trained(module).parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(arrived)
            if keeps:
                with mode.kind("gradients"):
                    p.grad = torch.empty_like(p)
    with mode.kind("batch"):
        batch = family.batch(plan, module)
    mode.wide = int(family.language_model(module).config.vocab_size)
    mode.begin()
    with mode.kind("activations"), family.watched(module, batch, mode):
        with torch.autocast("cpu", plan.autocast or torch.bfloat16, enabled=plan.autocast is not None):
            loss = family.loss(module, batch)
        if plan.accumulate == 1:
            module.zero_grad()
        torch.autograd.backward([loss])
    peak = Counter({kind: size for kind, size in mode.peak.items() if size and kind not in ("parameters", "other")})
    return Step(peak, mode.flops, mode.wide_flops, batch.edits.numel() + batch.queries.numel())


def _counts(family: Family, module: Any, loaded: int) -> Counts:
    model, frozen = family.trained(module), family.frozen(module)
    parts: dict[str, list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        parts.setdefault(family.part(module, name, p), []).append(p)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    alone = 0
    if frozen is not None:
        inner = {id(p) for p in frozen.base_model.parameters()}
        alone = sum(p.nbytes for p in frozen.parameters() if id(p) not in inner)
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
        outside=family.outside(module),
        frozen=sum(p.numel() for p in frozen.parameters()) if frozen is not None else 0,
        frozen_bytes=_bytes(frozen),
        frozen_head_bytes=alone,
        loaded_bytes=loaded,
        buffers=sum(b.nbytes for b in model.buffers()),
        frozen_name=family.frozen_name,
    )


def _bytes(module: nn.Module | None) -> int:
    return sum(p.nbytes for p in module.parameters()) if module is not None else 0
