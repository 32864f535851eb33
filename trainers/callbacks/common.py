"""What several callbacks need: the run's TensorBoard files, its records, and a model left as it was found."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn
from torch.utils.tensorboard.writer import SummaryWriter

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Editor


class TrainedEditor(Protocol):
    """The part of a LightningModule that callbacks use."""

    def editor(self) -> Editor:
        """The module as an editor."""
        ...

    def original(self) -> AbstractContextManager[Backbone]:
        """The unedited model, for the length of a `with`. What is asked of it later may be an edited one's answer."""
        ...


def trained_editor(module: L.LightningModule) -> TrainedEditor:
    """The module, known to be an editor.

    Raises:
        TypeError: where it is none.
    """
    if not all(hasattr(module, name) for name in ("editor", "original")):
        raise TypeError(f"{type(module).__name__} has no editor() and original(), so its edits cannot be looked at")
    return cast(TrainedEditor, module)


def validation_records(trainer: L.Trainer, count: int) -> list[EditRecord]:
    """The first `count` validation records of the run's DataModule, on every rank the same.

    Raises:
        TypeError: where the DataModule offers none.
    """
    records = getattr(getattr(trainer, "datamodule", None), "validation_records", None)
    if records is None:
        raise TypeError("this callback needs a DataModule with validation_records(), such as EditDataModule")
    return records()[:count]


def log_interval(trainer: L.Trainer) -> int:
    """`log_every_n_steps` of the Trainer, which its class does not declare."""
    return int(getattr(trainer, "log_every_n_steps", 50))


def writers(trainer: L.Trainer) -> list[SummaryWriter]:
    """TensorBoard's own writers, for what Lightning does not pass on: figures, histograms, text. None but on rank 0."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


@contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """No gradients, and afterwards every submodule in the mode, and every generator of random numbers in the state, of
    before: a run with a callback trains exactly as one without it. Weights in shards are whole within (ZeRO-3), so all
    ranks come here together."""
    modes = {m: m.training for m in module.modules()}
    trainer = getattr(module, "_trainer", None)
    gathered = getattr(trainer.strategy, "gathered", nullcontext) if trainer else nullcontext
    try:
        with gathered(), isolate_rng(), torch.no_grad():
            yield
    finally:
        for m, training in modes.items():
            m.training = training
