"""Progress as lines of text, for logs: Lightning's bar shows nothing where the output is no terminal."""

import math
import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from torch import Tensor


class ProgressLines(L.Callback):
    """Prints step, loss and time left, on rank 0, where the output is no terminal.

    The time left goes by what this run's steps took so far, with the validations between them.

    Args:
        every: seconds between two lines, at least; the run's last step has one if there was one before.

    Raises:
        ValueError: for a negative `every`.
    """

    def __init__(self, every: float = 60.0) -> None:
        if every < 0:
            raise ValueError(f"progress_lines.every is in seconds, at least 0, got {every}")
        self.every = every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun = self._told = time.monotonic()
        self._from = self._step = trainer.global_step
        self._steps = trainer.estimated_stepping_batches  # infinite where nothing ends the run

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, steps, now = trainer.global_step, self._steps, time.monotonic()
        if step == self._step or not trainer.is_global_zero or sys.stdout.isatty():
            return
        self._step = step
        ends = step == steps and self._told > self._begun
        if now - self._told < self.every and not ends:
            return
        self._told = now
        loss = trainer.callback_metrics.get("train/loss")
        said = f", loss {float(loss):.4g}" if isinstance(loss, Tensor) else ""
        of = left = ""
        if math.isfinite(steps):
            seconds = (now - self._begun) / (step - self._from) * (steps - step)
            of, left = f" of {steps:,}", f", about {timedelta(seconds=round(seconds))} left"
        print(f"step {step:,}{of}{said}{left}", flush=True)
