"""What several callbacks need: the run's TensorBoard files, its records, and a model left as it was found."""

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.seed import isolate_rng
from peft.tuners.tuners_utils import BaseTunerLayer
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


@contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """The model as it comes from disk: in eval mode, frozen, without adapters. Afterwards modes, `requires_grad`,
    gradients, hooks and forward methods are what they were, whatever was done to them; weights are not guarded."""
    modules = list(model.modules())
    adapters = [
        (parent, name, child)
        for parent in modules
        for name, child in parent.named_children()
        if isinstance(child, BaseTunerLayer)
    ]
    modes = [m.training for m in modules]
    forwards = [vars(m).get("forward") for m in modules]
    hooks = [(d, dict(d)) for m in modules for key, d in vars(m).items() if "_hooks" in key and isinstance(d, dict)]
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parent, name, child in adapters:
            setattr(parent, name, child.base_layer)
        for p, *_ in parameters:
            p.requires_grad_(False)
            p.grad = None
        model.eval()
        yield
    finally:
        for parent, name, child in adapters:
            setattr(parent, name, child)
        for m, training, forward in zip(modules, modes, forwards, strict=True):
            m.training = training
            vars(m).pop("forward", None)
            if forward is not None:
                vars(m)["forward"] = forward
        for there, before in hooks:
            there.clear()
            there.update(before)
        for p, required, gradient in parameters:
            p.requires_grad_(required)
            p.grad = gradient


class EveryNth:
    """Which validations a callback looks at: the first one, and every n-th after it.

    Args:
        n: 0 for the first one alone.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.seen = 0

    def looks(self, trainer: L.Trainer) -> bool:
        """Whether at this validation, which is counted; sanity checks are none."""
        if trainer.sanity_checking:
            return False
        self.seen += 1
        return (self.seen - 1) % self.n == 0 if self.n else self.seen == 1


@contextmanager
def by_hand(module: L.LightningModule) -> Iterator[Backbone]:
    """The run's unedited model, as whoever loads it by itself has it: whole, as loaded, with gradients where they are
    wanted. All ranks come here together; the run does not notice (see `untouched` and `as_loaded`)."""
    with (
        torch.inference_mode(False),  # outermost: what is gathered in inference mode cannot be differentiated through
        untouched(module),
        trained_editor(module).original() as backbone,
        as_loaded(backbone.model),
        torch.enable_grad(),
    ):
        yield backbone


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """Every rank's value, on every rank; all of them come here together."""
    if trainer.world_size == 1:
        return [value]
    values: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def seed_all(seed: int) -> None:
    """Seed torch (CPU, GPU), numpy and random."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
