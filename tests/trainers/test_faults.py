"""What goes wrong on many ranks, in jobs of real processes: no number, a dead or a hanging rank, a full disk, a kill
while a checkpoint is written. And what does not: a soak."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import TWO, start, together, zero

from trainers.checkpoints.folder import newest, verify

pytestmark = pytest.mark.filterwarnings("ignore")
STRATEGIES = {"ddp": ["--trainer.strategy=ddp_find_unused_parameters_true"], "zero2": zero(2), "zero3": zero(3)}
SKIP = ["--non_finite.action=skip"]


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Runs in which the fourth step's loss is no number on rank 1, and such as end before it."""
    runs = []
    for name, args in STRATEGIES.items():
        runs.append({"name": f"{name}-before", "args": [*TWO, *args], "steps": 3})
        runs.append({"name": f"{name}-stop", "args": [*TWO, *args], "steps": 6, "nan": [1, 3], "fails": True})
        runs.append({"name": f"{name}-gradient", "args": [*TWO, *args], "steps": 6, "fails": True})
        runs[-1]["nan_gradient"] = [1, 3]
        runs.append({"name": f"{name}-skip", "args": [*TWO, *args, *SKIP], "steps": 4, "nan": [1, 3]})
    runs.append({"name": "limit", "args": [*TWO, *zero(2), *SKIP, "--non_finite.limit=1"], "steps": 6, "fails": True})
    runs[-1]["nan"] = [1, None]
    return together(tmp_path_factory.mktemp("bad"), runs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_all_ranks_stop_before_a_step_with_a_loss_that_is_no_number(bad: dict[str, Any], strategy: str) -> None:
    before, stopped = bad[f"{strategy}-before"], bad[f"{strategy}-stop"]
    error = stopped["error"]
    assert error.startswith("NonFiniteError: step 4: the loss is not finite on rank 1 (records facts/")
    assert all(record in error for record in stopped["records"][1][3])
    assert not any(record in error for record in stopped["records"][0][3])
    assert all(torch.equal(t, stopped["params"][n]) for n, t in before["params"].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_gradient_that_is_no_number_stops_them_too(bad: dict[str, Any], strategy: str) -> None:
    before, stopped = bad[f"{strategy}-before"], bad[f"{strategy}-gradient"]
    assert stopped["error"].startswith("NonFiniteError: step 4: a gradient is not finite")
    assert all(stopped["records"][rank][3][0] in stopped["error"] for rank in (0, 1))
    assert all(torch.equal(t, stopped["params"][n]) for n, t in before["params"].items())


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_skipped_step_changes_nothing(bad: dict[str, Any], strategy: str) -> None:
    before, skipped = bad[f"{strategy}-before"], bad[f"{strategy}-skip"]
    assert skipped["error"] is None
    assert len(skipped["losses"]) == 4
    assert all(torch.equal(t, skipped["params"][n]) for n, t in before["params"].items())


def test_too_many_skipped_steps_stop_the_run(bad: dict[str, Any]) -> None:
    assert bad["limit"]["error"].startswith("NonFiniteError: step 2:")
    assert "limit is 1" in bad["limit"]["error"]


def until(condition: Callable[[], bool], processes: list[subprocess.Popen[str]], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert all(p.poll() is None for p in processes), "a rank ended early"
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def ended(processes: list[subprocess.Popen[str]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGCONT)
        process.kill()
        process.wait()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_that_is_gone_ends_the_other_in_time(how: signal.Signals, tmp_path: Path) -> None:
    """Killed, or stopped and thus alive but silent: within the strategy's timeout, of 20 seconds here."""
    args = [*TWO, *zero(2), "--trainer.strategy.init_args.timeout=20"]
    processes = start(tmp_path, [{"name": "run", "args": args, "steps": 100_000}])
    try:
        until(lambda: (tmp_path / "run.0.step").is_file(), processes)
        os.kill(processes[1].pid, how)
        assert processes[0].wait(timeout=60) != 0
    finally:
        ended(processes)


def test_the_timeout_is_that_of_every_group_of_ranks(tmp_path: Path) -> None:
    """Of DeepSpeed's own as well, in which a rank would wait half an hour for one that is gone."""
    args = [*TWO, *zero(2), "--trainer.strategy.init_args.timeout=45"]
    seen = together(tmp_path, [{"name": "run", "args": args, "steps": 1}])["run"]
    assert seen["timeouts"] == [45.0]


def test_a_job_killed_while_it_saves_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    args = [*TWO, *zero(2), "--checkpoint.every_n_steps=2"]
    processes = start(tmp_path, [{"name": "run", "args": args, "steps": 8, "slow_save": 4}])
    try:
        until((tmp_path / "saving").is_file, processes)
    finally:
        ended(processes)
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / ".step4.ckpt.partial").is_dir()
    chosen, warnings = newest(folder)
    assert chosen == folder / "step2.ckpt"
    assert len(warnings) == 1
    assert "step4" in warnings[0]
    runs = [
        {"name": "run", "args": args, "steps": 8, "resume": str(chosen)},
        {"name": "whole", "args": args, "steps": 8},
    ]
    seen = together(tmp_path, runs)
    assert seen["run"]["losses"] == seen["whole"]["losses"][2:]
    assert not (folder / ".step4.ckpt.partial").exists()


def test_a_full_disk_on_one_rank_stops_all_and_harms_nothing(tmp_path: Path) -> None:
    args = [*TWO, *zero(2), "--checkpoint.every_n_steps=2"]
    seen = together(tmp_path, [{"name": "run", "args": args, "steps": 8, "full_disk": [1, 4], "fails": True}])["run"]
    folder = tmp_path / "run" / "checkpoints"
    assert seen["error"].startswith("CheckpointError")
    assert str(folder / "step4.ckpt") in seen["error"]
    assert "No space left on device" in seen["error"]
    assert "step2.ckpt is intact" in seen["error"]
    assert verify(folder / "step2.ckpt")["step"] == 2
    assert [p.name for p in folder.iterdir()] == ["step2.ckpt"]


def test_a_soak_takes_no_more_and_more(tmp_path: Path) -> None:
    """Three hundred steps with pools of varied size, validations and checkpoints."""
    args = [*TWO, *zero(2), "--checkpoint.every_n_steps=50", "--trainer.val_check_interval=50"]
    seen = together(tmp_path, [{"name": "run", "args": args, "steps": 300, "usage": True}])["run"]
    memory, files, children = zip(*seen["usage"], strict=True)
    assert len(memory) == 300
    assert max(memory[200:]) < 1.05 * max(memory[60:120])
    assert max(files[200:]) <= max(files[60:120])
    assert children[-1] <= children[60]
