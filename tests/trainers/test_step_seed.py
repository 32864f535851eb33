"""Random numbers of training: the same after a resume and at any world size, different everywhere else."""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainers.signalling import RUN
from trainers.callbacks.step_seed import StepSeed
from trainers.cli import TrainingCLI

GPT2 = '{"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512, "resid_pdrop": 0.1}'


def weights(folder: Path, steps: int, seeded: bool, *more: str) -> dict[str, torch.Tensor]:
    """The trained weights of GPT-2, which has dropout, after so many steps."""
    args = [
        *RUN,
        f"--run_dir={folder}",
        f"--trainer.max_steps={steps}",
        "--model.init_args.backbone.source=random:gpt2",
        f"--model.init_args.backbone.overrides={GPT2}",
        *more,
    ]
    cli = TrainingCLI(args)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    cli.trainer.callbacks = [c for c in callbacks if seeded or not isinstance(c, StepSeed)]  # type: ignore[attr-defined]
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.checkpoint())
    return dict(cli.model.state_dict())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeded", [True, False])
def test_dropout_of_a_resumed_run_is_the_uninterrupted_ones(seeded: bool, tmp_path: Path) -> None:
    whole = weights(tmp_path / "whole", 4, seeded)
    weights(tmp_path / "part", 2, seeded)
    # with a validation in between, which the uninterrupted run did not have
    resumed = weights(tmp_path / "part", 4, seeded, "--ckpt_path=last", "--trainer.val_check_interval=3")
    assert all(torch.equal(t, resumed[name]) for name, t in whole.items()) == seeded


def draws(step: int, batch: int, rank: int = 0, ranks: int = 1, accumulated: int = 4, seed: int = 1) -> list[float]:
    """What torch, numpy and random draw in a micro-batch."""
    trainer: Any = SimpleNamespace(
        global_step=step, accumulate_grad_batches=accumulated, global_rank=rank, world_size=ranks
    )
    callback = StepSeed(seed)
    callback.on_fit_start(trainer, None)  # type: ignore[arg-type]
    callback.on_train_batch_start(trainer, None, None, batch)  # type: ignore[arg-type]
    return [torch.rand(()).item(), float(np.random.rand()), random.random()]


def test_a_step_draws_the_same_at_any_number_of_ranks() -> None:
    alone = [draws(7, batch) for batch in range(28, 32)]
    two = [draws(7, batch, rank, ranks=2, accumulated=2) for batch in (14, 15) for rank in (0, 1)]
    four = [draws(7, 7, rank, ranks=4, accumulated=1) for rank in range(4)]
    assert alone == two == four


def test_each_place_draws_its_own() -> None:
    places = [draws(step, batch) for step in (0, 1) for batch in range(4)] + [draws(0, 0, seed=2)]
    for library in zip(*places, strict=True):
        assert len(set(library)) == len(places)


def test_seed_is_that_of_everything_or_must_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    assert draws(0, 0, seed=None) == draws(0, 0, seed=5)  # type: ignore[arg-type]
    monkeypatch.delenv("PL_GLOBAL_SEED")
    with pytest.raises(ValueError, match="seed_everything"):
        draws(0, 0, seed=None)  # type: ignore[arg-type]
