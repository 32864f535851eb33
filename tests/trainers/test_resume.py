"""The tiny config in training: a golden curve, overfitting, and a resumed run that is the uninterrupted one.

A change that is meant to move the curve: PALIMPSEST_UPDATE_GOLDEN=1 pytest tests/trainers/test_resume.py
"""

import json
import os
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from datamodules.schedule import Slot
from trainers.cli import TrainingCLI

GOLDEN = Path(__file__).parents[1] / "golden" / "incomes_tiny.json"
pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(L.Callback):
    """What every step saw and gave."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        self.losses: list[dict[str, float]] = []
        self.rates: list[list[float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        self.seen.append(batch.records)
        self.losses.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})
        self.rates.append([g["lr"] for g in trainer.optimizers[0].param_groups])


def run(folder: Path, steps: int, checkpoint: Path | None = None, *more: str) -> tuple[TrainingCLI, Watch]:
    cli = TrainingCLI(
        [
            "--config=incomes_tiny",
            f"--run_dir={folder}",
            f"--trainer.max_steps={steps}",
            "--model.init_args.optimizer.decay_steps=20",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *more,
        ]
    )
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=str(checkpoint) if checkpoint else None)
    return cli, watch


def state(cli: TrainingCLI) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    moments = [t for s in cli.trainer.optimizers[0].state.values() for t in s.values() if isinstance(t, torch.Tensor)]
    return dict(cli.model.state_dict()), moments


@pytest.mark.parametrize("options", [[], ["--model.init_args.train=upper", "--model.init_args.reader=original"]])
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, options: list[str]) -> None:
    whole, seen = run(tmp_path / "whole", 6, None, *options)
    _, before = run(tmp_path / "part", 3, None, *options)
    torch.rand(5)
    resumed, after = run(tmp_path / "part", 6, tmp_path / "part" / "checkpoints" / "step3.ckpt", *options)
    same(whole, seen, resumed, before, after)


@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (2, ["--trainer.val_check_interval=8", "--checkpoint.every_n_steps=4"]),
        (1, ["--trainer.val_check_interval=2", "--checkpoint.monitor=train/loss", "--checkpoint.top_k=9"]),
    ],
    ids=["saved before its validation", "saved after it"],
)
def test_resumed_where_a_validation_is(tmp_path: Path, accumulate: int, options: list[str]) -> None:
    options = [*options, f"--trainer.accumulate_grad_batches={accumulate}", "--checkpoint.at_end=false"]
    whole, seen = run(tmp_path / "whole", 6, None, *options)
    _, before = run(tmp_path / "part", 5, None, *options)
    resumed, after = run(tmp_path / "part", 6, tmp_path / "part" / "checkpoints" / "step4.ckpt", *options)
    for of_every_batch in (before.seen, before.losses, before.rates):
        del of_every_batch[4 * accumulate :]
    same(whole, seen, resumed, before, after)


def same(whole: TrainingCLI, seen: Watch, resumed: TrainingCLI, before: Watch, after: Watch) -> None:
    """A run in two parts is the uninterrupted one, bit for bit."""
    assert before.seen + after.seen == seen.seen
    assert before.losses + after.losses == seen.losses
    assert before.rates + after.rates == seen.rates
    (params, moments), (other, other_moments) = state(whole), state(resumed)
    assert params.keys() == other.keys()
    assert all(torch.equal(t, other[n]) for n, t in params.items())
    assert len(moments) == len(other_moments) > 0
    assert all(torch.equal(a, b) for a, b in zip(moments, other_moments, strict=True))
    whole_teacher, resumed_teacher = (c.model._outside["teacher"].state_dict() for c in (whole, resumed))  # type: ignore[union-attr]
    assert all(torch.equal(t, resumed_teacher[n]) for n, t in whole_teacher.items())


def test_golden_curve(tmp_path: Path) -> None:
    _, watch = run(tmp_path, 20)
    losses = [row["train/loss"] for row in watch.losses]
    if os.environ.get("PALIMPSEST_UPDATE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps({"train/loss": losses}, indent=1) + "\n", encoding="utf-8")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))["train/loss"], rel=1e-4)


@pytest.mark.parametrize("train", ["full", "upper", "lora"])
def test_one_batch_is_overfitted(train: str, tmp_path: Path) -> None:
    """The loss falls to less than half within 60 steps."""
    cli = TrainingCLI(["--config=incomes_tiny", f"--run_dir={tmp_path}", f"--model.init_args.train={train}"])
    module: Any = cli.model
    cli.datamodule.prepare_data()
    torch.manual_seed(0)
    module.configure_model()
    records = cli.datamodule.validation_records()[:4]
    batch = module.collator()([Slot(r, 0, i) for i, r in enumerate(records)])
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(60):
        loss = module.losses(batch, batch.visible)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
