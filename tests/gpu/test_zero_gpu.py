"""ZeRO on a GPU (NCCL), in processes of their own: the tiny config against one process without ZeRO. One GPU is enough
for what differs from CPUs: DeepSpeed on CUDA, offload, bf16 and fp16, save and resume. With two or more, two ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ONE, together, zero

GPUS = torch.cuda.device_count()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="needs CUDA")]
STEPS = 10
CUDA = ["--trainer.accelerator=gpu"]
OFFLOAD = [f"--trainer.strategy.init_args.offload_{what}=true" for what in ("optimizer", "parameters")]
SPREADS = {"zero2": zero(2), "zero3": zero(3), "offload": zero(3, *OFFLOAD)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gpu")
    shape = ONE if GPUS == 1 else ["--trainer.devices=2"]
    wanted = [{"name": name, "args": [*shape, *CUDA, *args], "steps": STEPS} for name, args in SPREADS.items()]
    wanted.append({"name": "half", "args": [*shape, *CUDA, *zero(3)], "steps": 5, "save": True})
    saved = str(folder / "half" / "checkpoints" / "step5.ckpt")
    wanted.append({"name": "rest", "args": [*shape, *CUDA, *zero(3)], "steps": STEPS, "resume": saved})
    for precision in ("bf16-mixed", "16-mixed"):
        args = [*shape, *CUDA, *zero(2), f"--trainer.precision={precision}", "--trainer.val_check_interval=2"]
        wanted.append({"name": precision, "args": args, "steps": 4})
    plain = [{"name": "plain", "args": [*ONE, *CUDA], "steps": STEPS}]
    return together(folder, wanted, ranks=min(GPUS, 2)) | together(folder, plain, ranks=1)


def steps(losses: list[float], count: int) -> list[float]:
    """The loss of each of `count` optimizer steps, from those of its micro-batches."""
    each = len(losses) // count
    return [sum(losses[i : i + each]) / each for i in range(0, len(losses), each)]


@pytest.mark.parametrize("spread", SPREADS)
def test_losses_and_parameters_are_those_without_zero(runs: dict[str, Any], spread: str) -> None:
    found, plain = runs[spread], runs["plain"]
    assert steps(found["losses"], STEPS) == pytest.approx(steps(plain["losses"], STEPS), rel=1e-4)
    for name, tensor in plain["params"].items():
        torch.testing.assert_close(found["params"][name], tensor, rtol=1e-5, atol=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(runs: dict[str, Any]) -> None:
    half = len(runs["half"]["losses"])
    assert runs["rest"]["losses"] == pytest.approx(runs["zero3"]["losses"][half:], rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_half_precision_trains_alike(runs: dict[str, Any], precision: str) -> None:
    assert steps(runs[precision]["losses"], 4)[:2] == pytest.approx(steps(runs["plain"]["losses"], STEPS)[:2], rel=0.03)
