"""Runs of one weight with made-up scores, and the checkpoints that they keep."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainers.callbacks.save_checkpoints import SCORES, SaveCheckpoints
from trainers.checkpoints.folder import verify, whole
from trainers.checkpoints.single import FolderIO

SCORED = {1: 0.5, 2: 0.875, 3: 0.125, 4: 0.75, 5: 0.875, 6: 0.25}


class Scored(L.LightningModule):
    """One weight, and a score for each validation by the step it comes at."""

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.made_up = scores or {}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return (self.weight - batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking:  # on a part of the data, not every metric need have a value
            self.log("val/score", self.made_up.get(self.global_step, 0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Named(Scored):
    """One that says what validation may log though the sanity check does not, and logs a metric there."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val/loss", 0.0)
        super().validation_step(batch, index)

    def may_log(self) -> set[str]:
        return {"val/score"}


class Watch(L.Callback):
    """What lies in the folder after every step, before and after its validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, list[str]]] = []

    def look(self, trainer: L.Trainer) -> None:
        self.seen.append((trainer.global_step, sorted(p.name for p in whole(self.folder))))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)


def train(
    folder: Path,
    steps: int,
    scores: dict[int, float] | None = None,
    every: int = 1,
    resume: Path | None = None,
    module: type[Scored] = Scored,
    **how: Any,
) -> tuple[L.Trainer, SaveCheckpoints, Watch]:
    """A run of so many steps, with a validation every `every` micro-batches; `how`: of SaveCheckpoints or Trainer."""
    loader = DataLoader(TensorDataset(torch.arange(100.0)[:, None]))
    own = {k: how.pop(k) for k in ("every_n_steps", "monitor", "mode", "top_k", "at_end") if k in how}
    saves, watch = SaveCheckpoints(str(folder), **own), Watch(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[FolderIO()],
        callbacks=[watch, saves, *how.pop("callbacks", [])],
        logger=False,
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=folder.parent,
        **how,
    )
    trainer.fit(module(scores), loader, DataLoader(TensorDataset(torch.zeros(1, 1))), ckpt_path=resume)
    return trainer, saves, watch


def kept(folder: Path) -> list[int]:
    """Steps of what lies in the folder."""
    return sorted(verify(path)["step"] for path in folder.glob("*.ckpt"))


def noted(folder: Path) -> dict[str, float]:
    return json.loads((folder / SCORES).read_text(encoding="utf-8"))


class Preempt(L.Callback):
    """Has every step saved before it is made."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for saves in trainer.checkpoint_callbacks:
            assert isinstance(saves, SaveCheckpoints)
            saves.save(trainer)
