"""Random numbers of training that depend on the place in the training alone."""

import os
from typing import Any

import lightning as L

from datamodules.schedule import stable_hash
from trainers.callbacks.common import seed_all


class StepSeed(L.Callback):
    """Seeds torch (CPU, GPU), numpy and random before each micro-batch: from the seed, the optimizer step, and which of
    the step's micro-batches on all ranks it is.

    So a resumed run draws what the uninterrupted one would have drawn (dropout, noise), with nothing in the checkpoint,
    and whatever validations or evaluations came between. Ranks draw different numbers. As with the records (see
    `PoolSchedule`), a step draws the same ones on W ranks with A micro-batches each, as long as W * A is held fixed.

    Args:
        seed: None: that of `seed_everything`.

    Raises:
        ValueError: at the start, if there is neither.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        everything = os.environ.get("PL_GLOBAL_SEED")  # where Lightning keeps it, also for the ranks that it starts
        if self.seed is None and everything is None:
            raise ValueError("StepSeed has no seed: give it one (seed), or set seed_everything to a number")
        self._seed = int(everything or 0) if self.seed is None else self.seed

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # an epoch, and a resumed run, begins with the first micro-batch of a step
        place = batch_idx % trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
        seed_all(stable_hash("draws", self._seed, trainer.global_step, place))
