"""Which pool sizes training has drawn."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from trainers.callbacks.common import log_interval, writers


class PoolSizes(L.Callback):
    """Logs, every `log_every_n_steps` of the Trainer, a histogram train/pool_size and its mean train/pool_size_mean.

    A size is the number of a pool's distinct edits. Counted are all pools of rank 0 since the last time; those of the
    other ranks have as many records.
    """

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = self._logged = trainer.global_step
        self._visible: list[Tensor] = []
        self._sizes: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.is_global_zero:
            return
        self._visible.append(batch.visible)
        if trainer.global_step == self._step:  # the device is waited for once a step, not once a micro-batch
            return
        self._step = trainer.global_step
        self._sizes += [pool_sizes(visible).cpu() for visible in self._visible]
        self._visible.clear()
        if self._step - self._logged >= log_interval(trainer):
            self._logged = self._step
            sizes = torch.cat(self._sizes).float()
            self._sizes.clear()
            for file in writers(trainer):
                file.add_histogram("train/pool_size", sizes, self._step)
                file.add_scalar("train/pool_size_mean", sizes.mean(), self._step)


def pool_sizes(visible: Tensor) -> Tensor:
    """Edits of each pool of a micro-batch [pools], from which edits each query sees [B, N], bool."""
    return visible.unique(dim=0).sum(1)
