"""No old checkpoint goes before its time, whatever fails."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scored_runs import SCORED, kept, train

from trainers import fit
from trainers.checkpoints.folder import CheckpointError, newest, whole

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_failed_save_ends_the_run_and_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step3.ckpt: No space left.*step2.ckpt is intact"):
        train(tmp_path, 5, SCORED, every_n_steps=1, monitor="val/score", mode="min")
    assert kept(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_the_old_one_goes_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.callbacks import save_checkpoints

    real, there = save_checkpoints.remove, []

    def watch(path: Path) -> str | None:
        there.append((path.name, [p.name for p in whole(tmp_path)]))
        return real(path)

    monkeypatch.setattr(save_checkpoints, "remove", watch)
    train(tmp_path, 3, every_n_steps=1)
    assert there == [("step1.ckpt", ["step2.ckpt", "step1.ckpt"]), ("step2.ckpt", ["step3.ckpt", "step2.ckpt"])]


def test_a_failed_removal_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.callbacks import save_checkpoints

    monkeypatch.setattr(save_checkpoints, "remove", lambda path: f"could not remove {path}")
    with pytest.warns(UserWarning, match=r"could not remove .*step1.ckpt"):
        train(tmp_path, 2, every_n_steps=1)
    assert kept(tmp_path) == [1, 2]


SLOW_FIT = """
import sys, time
import torch
from trainers import fit
real, calls = torch.save, []
def slow(value, file):
    real(value, file)
    calls.append(1)
    if len(calls) == 2:
        print("saving", flush=True)
        time.sleep(60)
torch.save = slow
fit.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--config=incomes_tiny", f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=1"]
    options += ["--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0", "--trainer.enable_model_summary=false"]
    options += ["--trainer.enable_progress_bar=false", "--ckpt_path=last"]
    with subprocess.Popen([sys.executable, "-c", SLOW_FIT, *options], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert any(line == b"saving\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    folder = tmp_path / "checkpoints"
    assert (folder / ".step2.ckpt.partial" / "state.ckpt").is_file()
    chosen, warnings = newest(folder)
    assert chosen == folder / "step1.ckpt"
    assert len(warnings) == 1
    capfd.readouterr()
    fit.main(options)
    said = capfd.readouterr()
    assert said.err.count(".step2.ckpt.partial") == 1
    assert f"continuing from {chosen}" in said.out
    assert os.listdir(folder) == ["step3.ckpt"]
