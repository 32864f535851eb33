"""The dry run: what is shared out over GPUs, offloaded and gathered, and in which types."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from estimate_plans import tiny_plan

from trainers.estimate import remedies
from trainers.estimate.measure import Counts, count
from trainers.estimate.plan import Sharding, sharding_of
from trainers.estimate.state import state


def made(element: int = 2, trained: int = 800, frozen: int = 200) -> Counts:
    sizes = (trained - 8, 8, frozen)
    whole = element * (trained + frozen)
    return Counts({}, sizes, trained, trained - 8, whole, element * trained, 100, 1000, 2000, 400, whole + 2000)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2000, 1600, 1200), (2, 2000, 200, 1200), (3, 250, 200, 1200)],
)
def test_stages_on_eight_gpus(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    """Trained 800, frozen 200, of 2 bytes; 12 bytes of Adam and master weights each."""
    held = state(made(), Sharding(stage=stage, reduce_bucket=50, buckets=2, threshold=10), 8)
    assert held.always == {"weights": weights, "gradients": gradients, "optimizer": optimizer, "teacher": 2000}
    assert held.in_step["buckets"] == 2 * 3 * 50
    assert held.in_update == {"update": 10 * 100}
    on_cpu = state(made(), Sharding(stage=stage, reduce_bucket=50, buckets=2, threshold=10), 8, on_gpu=False)
    assert on_cpu.in_update == {"update": 6 * 100}


def test_without_deepspeed_everything_is_everywhere() -> None:
    one, eight = state(made(4), Sharding(), 1), state(made(4), Sharding(), 8)
    assert one.always == {"weights": 4000, "optimizer": 2 * 3200, "teacher": 2000}
    assert eight.always == one.always | {"buckets": 3200}  # DDP's
    assert one.in_update == {"gradients": 3200, "update": 3200}


def test_accumulation_holds_gradients_twice() -> None:
    sharding = Sharding(stage=2, reduce_bucket=50)
    assert "accumulation" not in state(made(), sharding, 8, accumulate=1).in_step
    assert state(made(), sharding, 8, accumulate=4).in_step["accumulation"] == 200


def test_offload() -> None:
    held = state(made(), Sharding(stage=2, offload_optimizer=True, reduce_bucket=50), 8)
    assert held.always == {"weights": 2000, "teacher": 2000}
    assert held.host == {"optimizer": 12 * 100, "gradients": 6 * 100}
    assert held.in_step["one gradient"] == 2 * 792
    held = state(made(), Sharding(stage=3, offload_optimizer=True, offload_parameters=True), 8)
    assert held.always == {"teacher": 2000}
    assert held.host == {"weights": 250, "optimizer": 1200, "gradients": 600}


def test_stage_3_gathers() -> None:
    sharding = Sharding(stage=3, max_live=300, threshold=10, partition_teacher=True)
    held = state(made(), sharding, 8)
    assert held.always["teacher"] == 400 + 1600 // 8  # its head stays whole
    assert held.in_step["gathered weights"] == 2 * (300 + 100 + 8) + 2 * 300
    assert held.in_validation == {"gathered weights": 2000 + 1600}
    alone = state(made(), replace(sharding, partition_teacher=False), 1)
    assert alone.in_step["gathered weights"] == 0
    assert not alone.in_validation


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("zero1.yaml", Sharding(stage=1, buckets=2)),
        ("zero2.yaml", Sharding(stage=2, buckets=2)),
        ("zero2_offload.yaml", Sharding(stage=2, buckets=2, offload_optimizer=True)),
        ("zero3.yaml", Sharding(stage=3, partition_teacher=True)),
    ],
)
def test_shipped_strategies(file: str, expected: Sharding) -> None:
    found = tiny_plan(f"--config={file}").sharding
    assert found == replace(expected, reduce_bucket=200_000_000)
    assert found == remedies.shipped(file)


def test_strategies_by_name() -> None:
    assert sharding_of("auto") == sharding_of("ddp") == Sharding()
    assert sharding_of("deepspeed_stage_3_offload").offload_parameters
    with pytest.raises(ValueError, match="fsdp"):
        sharding_of("fsdp")


@pytest.mark.parametrize(
    ("precision", "strategy", "cast", "autocast"),
    [
        ("32-true", [], None, None),
        ("bf16-mixed", [], None, torch.bfloat16),
        ("bf16-mixed", ["--config=zero2.yaml"], torch.bfloat16, None),
    ],
)
def test_precision(precision: str, strategy: list[str], cast: Any, autocast: Any) -> None:
    plan = tiny_plan(*strategy, f"--trainer.precision={precision}")
    assert (plan.cast, plan.autocast) == (cast, autocast)
    counts = count(plan)
    assert counts.bytes == sum(counts.sizes) * (2 if cast else 4)
    assert counts.frozen_bytes == 4 * counts.frozen  # outside the module: nothing casts it
