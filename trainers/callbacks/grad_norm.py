"""The norm of all gradients before they are clipped."""

from typing import Any

import lightning as L
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer


class GradNorm(L.Callback):
    """Logs train/grad_norm every `log_every_n_steps` of the Trainer: the 2-norm of all gradients, before clipping.

    Under DeepSpeed, which shards gradients and clips by itself, it is the norm that its engine reports.
    """

    def __init__(self) -> None:
        self._step = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if not _has_engine(trainer):
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            pl_module.log("train/grad_norm", get_total_norm(grads))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step or not _has_engine(trainer):
            return
        self._step = trainer.global_step
        norm: Tensor | float | None = trainer.model.get_global_grad_norm()  # type: ignore[union-attr, operator]
        if norm is not None:
            pl_module.log("train/grad_norm", float(norm))


def _has_engine(trainer: L.Trainer) -> bool:
    return hasattr(trainer.model, "get_global_grad_norm")
