"""What a log of a run says while it trains."""

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainers.callbacks import ProgressLines, progress_lines


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Steps of ten seconds each, from one on, with two micro-batches a step."""

    def run(
        lines: ProgressLines, steps: int = 8, begin: int = 0, rank_zero: bool = True, endless: bool = False
    ) -> None:
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(progress_lines.time, "monotonic", lambda: clock.now)
        trainer: Any = SimpleNamespace(
            global_step=begin,
            estimated_stepping_batches=float("inf") if endless else steps,
            is_global_zero=rank_zero,
            callback_metrics={},
        )
        lines.on_train_start(trainer, None)  # type: ignore[arg-type]
        for i in range(2 * (steps - begin)):
            clock.now += 5
            trainer.global_step = begin + (i + 1) // 2
            trainer.callback_metrics["train/loss"] = torch.tensor(1 / (1 + i))
            lines.on_train_batch_end(trainer, None, None, None, i)  # type: ignore[arg-type]

    return run


def test_a_line_every_so_many_seconds_and_at_the_end(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(ProgressLines(every=30))
    assert capsys.readouterr().out.splitlines() == [
        "step 3 of 8, loss 0.1667, about 0:00:50 left",
        "step 6 of 8, loss 0.08333, about 0:00:20 left",
        "step 8 of 8, loss 0.0625, about 0:00:00 left",
    ]


def test_a_resumed_run_counts_its_own_steps(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(ProgressLines(every=20), begin=4)
    assert "step 6 of 8, loss 0.25, about 0:00:20 left" in capsys.readouterr().out


def test_a_run_without_end_tells_no_time(train: Any, capsys: pytest.CaptureFixture[str]) -> None:
    train(ProgressLines(every=30), steps=4, endless=True)
    assert capsys.readouterr().out == "step 3, loss 0.1667\n"


def test_short_runs_other_ranks_and_terminals_have_none(
    train: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train(ProgressLines(), steps=5)
    train(ProgressLines(every=0), steps=4, rank_zero=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    train(ProgressLines(every=0))
    assert capsys.readouterr().out == ""


def test_a_negative_pause_is_refused() -> None:
    with pytest.raises(ValueError, match=r"progress_lines\.every is in seconds"):
        ProgressLines(every=-1)
