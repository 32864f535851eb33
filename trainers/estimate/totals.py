"""Memory by component and expected speed of a plan."""

from dataclasses import dataclass, field

import torch

from trainers.cli import TrainingCLI
from trainers.estimate.cards import Card
from trainers.estimate.measure import Counts, Step, measure
from trainers.estimate.plan import Plan, plan_of
from trainers.estimate.state import (
    COMMUNICATION,
    CONTEXT,
    CPU_PROCESS,
    FRAGMENTS,
    HOST_FRAGMENTS,
    HOST_PROCESS,
    HOST_WORKER,
    State,
    state,
)

UTILISATION = 0.4
"""Assumed share of the card's dense peak, in their own precision, that all multiplications reach together, those
repeated by checkpointing too. Published training runs of 1-8B models reach 0.33 to 0.58 in bf16 (torchtitan,
LLM-Foundry, litgpt)."""

LOADING, STEP, UPDATE, VALIDATION = "loading", "forward and backward", "optimizer", "validation"


@dataclass(frozen=True)
class Estimate:
    """What a run needs, in bytes of one GPU (or one process on CPUs), at its different moments.

    Args:
        moments: components of each moment.
        host: components of one machine's memory.
        tokens: edit and query tokens of an optimizer step of the whole job, all texts being the longest.
        flops: of one such token, those of the unedited model and repeated ones too.
        tokens_per_second: of the whole job; None where the card's speed is not known, or not what limits.
    """

    plan: Plan = field(repr=False)
    counts: Counts = field(repr=False)
    moments: dict[str, dict[str, int]]
    host: dict[str, int]
    tokens: int
    flops: float
    tokens_per_second: float | None

    @property
    def moment(self) -> str:
        """The one that needs most."""
        return max(self.moments, key=lambda m: sum(self.moments[m].values()))

    @property
    def components(self) -> dict[str, int]:
        """Of the moment that needs most."""
        return self.moments[self.moment]

    @property
    def total(self) -> int:
        return sum(self.components.values())

    @property
    def capacity(self) -> int:
        """What one process may use: the card, or its share of the host."""
        card = self.plan.card
        return card.memory * self.plan.nodes // self.plan.gpus if card.cpu else card.memory

    @property
    def fits(self) -> bool:
        return self.total <= self.capacity

    @property
    def hours(self) -> float | None:
        """Of `max_steps`, without validation and saving."""
        known = self.tokens_per_second and self.plan.steps
        return self.plan.steps * self.tokens / self.tokens_per_second / 3600 if known else None  # type: ignore[operator]


def estimate(cli: TrainingCLI, gpus: int, card: Card) -> Estimate:
    """What the configured run needs on so many GPUs of all its machines together. No weight is loaded.

    Raises:
        ValueError: for what the dry run does not know, or a backbone whose shape cannot be had.
    """
    return estimate_plan(plan_of(cli, gpus, card))


def estimate_plan(plan: Plan) -> Estimate:
    """`estimate`, of a plan."""
    counts, step = measure(plan)
    held = state(counts, plan.sharding, plan.gpus, plan.accumulate, on_gpu=not plan.card.cpu)
    moments = _moments(plan, counts, step, held)
    flops = step.flops / step.tokens
    speed = None
    sixteen = plan.compute in (torch.bfloat16, torch.float16)
    offloads = plan.sharding.offload_optimizer or plan.sharding.offload_parameters
    if plan.card.flops and plan.card.wide_flops and sixteen and not offloads:
        seconds = (step.flops - step.wide_flops) / plan.card.flops + step.wide_flops / plan.card.wide_flops
        speed = plan.gpus * UTILISATION * step.tokens / seconds
    return Estimate(
        plan=plan,
        counts=counts,
        moments=moments,
        host=_host(plan, counts, held),
        tokens=step.tokens * plan.gpus * plan.accumulate,
        flops=flops,
        tokens_per_second=speed,
    )


def _moments(plan: Plan, counts: Counts, step: Step, held: State) -> dict[str, dict[str, int]]:
    on_cpu = plan.card.cpu
    allowance = {"process": CPU_PROCESS} if on_cpu else {"CUDA context": CONTEXT}
    if plan.gpus > 1 and not on_cpu:
        allowance["communication"] = COMMUNICATION
    always, in_step = held.always, dict(held.in_step)
    if on_cpu:  # host and device are one; a bucket's pages count when they are written to
        always = _sum(always, held.host)
        in_step = {k: min(size, 2 * counts.trained_bytes) if k == "buckets" else size for k, size in in_step.items()}
    moving = _sum(in_step, step.peak)
    moving["fragments"] = int((HOST_FRAGMENTS if on_cpu else FRAGMENTS) * sum(moving.values()))
    found = {
        LOADING: {"weights": counts.loaded_bytes - counts.frozen_bytes, counts.frozen_name: counts.frozen_bytes},
        STEP: _sum(always, moving),
        UPDATE: _sum(always, held.in_update),
    }
    if held.in_validation:
        found[VALIDATION] = _sum(always, held.in_validation)
    return {moment: _sum(parts, allowance) for moment, parts in found.items()}


def _host(plan: Plan, counts: Counts, held: State) -> dict[str, int]:
    if plan.card.cpu:
        return {}
    here = -(-plan.gpus // plan.nodes)
    found = {name: size * here for name, size in held.host.items()}
    if (
        plan.sharding.stage == 3 and counts.frozen_bytes
    ):  # built there; weights read from files are shared, a copy is not
        found[f"{counts.frozen_name}, while loading"] = counts.frozen_bytes * here
    return found | {
        "processes": HOST_PROCESS * here,
        "loader workers": HOST_WORKER * here * plan.workers,
    }


def _sum(*parts: dict[str, int]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in parts:
        for name, size in part.items():
            total[name] = total.get(name, 0) + size
    return total
