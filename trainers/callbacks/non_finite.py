"""A guard: no step is taken with a loss or a gradient that is not a number."""

from typing import Any, Literal

import lightning as L
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

SHOWN = 8  # records that a message names


class NonFiniteError(RuntimeError):
    """A loss or a gradient that is infinite or no number. The text says where, and what to do."""


class NonFinite(L.Callback):
    """Stops all ranks before an optimizer step in which a loss or a gradient, on any of them, is not finite.

    The message names the step and the records, those of the micro-batch where it was the loss. With `skip` such a step
    changes nothing, and training goes on; train/skipped_steps counts them. The gradients of 16-bit floats with loss
    scaling may overflow while the scale is sought: there the loss alone is judged.

    Args:
        action: `stop`, or `skip` the step.
        limit: with `skip`, how many steps of a run may be skipped before it stops after all.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", limit: int = 10) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1 step, got {limit}")
        self.action, self.limit = action, limit
        self.skipped = 0

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._step = trainer.global_step
        self._records: list[list[str]] = []  # of each micro-batch of this optimizer step
        self._bad: list[Tensor] = []  # whether its loss was

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._records.append(list(getattr(batch, "records", [])))

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        value = loss.detach()
        self._bad.append(~value.isfinite())
        if loss.requires_grad:
            # a bad loss can have good gradients; made bad too, they stop the step on every rank and in every strategy
            loss.register_hook(lambda gradient: gradient + 0 * value)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if _judges(trainer):
            return
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        overflow = not scaled and not bool(get_total_norm(gradients).isfinite())
        if self._met(trainer, pl_module, overflow):
            optimizer.zero_grad(set_to_none=True)  # without gradients the step does nothing

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        if _judges(trainer):
            self._met(trainer, pl_module, trainer.strategy.refused_step)  # type: ignore[attr-defined]
        self._step = trainer.global_step
        self._records.clear()
        self._bad.clear()

    def _met(self, trainer: L.Trainer, module: L.LightningModule, overflow: bool) -> bool:
        """Whether this step is to be left out, on all ranks alike.

        Raises:
            NonFiniteError: if the run is to stop.
        """
        bad = [bool(b) for b in self._bad]
        if not trainer.strategy.reduce_boolean_decision(overflow or any(bad), all=False):
            return False
        where = _gathered(_told(trainer.global_rank, self._records, bad))
        self.skipped += 1
        text = f"step {self._step + 1}: {'; '.join(where)}"
        if self.action == "stop" or self.skipped > self.limit:
            why = "" if self.action == "stop" else f" It is the {self.skipped}th such step, and limit is {self.limit}."
            raise NonFiniteError(
                f"{text}. No parameter was changed.{why} Look at these records, lower the learning rate, train in "
                "bf16 rather than fp16, or leave such steps out (trainers.callbacks.NonFinite, action: skip)"
            )
        if trainer.is_global_zero:
            print(f"skipped {text}")
        module.log("train/skipped_steps", float(self.skipped))
        return True


def _judges(trainer: L.Trainer) -> bool:
    """Whether the strategy looks at the gradients itself, in its step, as ZeRO does with its shards."""
    return hasattr(type(trainer.strategy), "refused_step")


def _told(rank: int, records: list[list[str]], bad: list[bool]) -> str:
    """What one rank has to say: the records of its micro-batches with a bad loss or, where it has none, of all."""
    wrong = [part for part, is_bad in zip(records, bad, strict=True) if is_bad]
    names = [name for part in wrong or records for name in part]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    what = "the loss is not finite" if wrong else "the loss is finite"
    return f"{what} on rank {rank} (records {', '.join(names[:SHOWN])}{more})"


def _gathered(told: str) -> list[str]:
    """What every rank has to say: those with a bad loss, if there are any; else it is the gradient."""
    every = [told]
    if dist.is_available() and dist.is_initialized():
        every = [""] * dist.get_world_size()
        dist.all_gather_object(every, told)
    bad = [text for text in every if "not finite" in text]
    return bad or ["a gradient is not finite", *every]
