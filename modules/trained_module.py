"""What all trained editors share: a model made when first asked for, losses logged by their parts, and validation by
the protocols of `trainers.evaluate`. A checkpoint holds what is trained, and nothing else.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord
from modules.backbone import Backbone, BackboneConfig, load_tokenizer
from modules.checkpoint_names import misfit
from modules.editor import Edited, TrainedEditor
from modules.evaluation import Answers, RecordPool, evaluate_pool
from modules.metrics import EditMetrics


class _OfBackbone(Protocol):
    backbone: Backbone


M = TypeVar("M", bound=_OfBackbone)


class WarmUp:
    """Of an optimizer's options: a constant rate after a linear warm-up."""

    warmup_steps: int

    def share(self, step: int) -> float:
        """The rate at a step, as a share of its peak."""
        return min(1.0, (step + 1) / max(1, self.warmup_steps))


class TrainedModule(L.LightningModule, Generic[M]):
    """A LightningModule that trains an editor; `M` is what its checkpoints are of, with the backbone that is edited.

    Args:
        backbone: the language model to edit.
        exact_match: also validate by generation.
    """

    def __init__(self, backbone: BackboneConfig, exact_match: bool) -> None:
        super().__init__()
        self.backbone_config = backbone
        self.exact_match = exact_match
        self.model: M | None = None
        self._answers: Answers | None = None
        self.metrics: EditMetrics | None = None
        self.teaches = True  # off: only to edit with, so that no teacher is copied that nobody would ask

    # ------------------------------------------------------------------ building

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.backbone_config)

    @property
    def built(self) -> M:
        """The model, made now where it is not there yet."""
        if self.model is None:
            self.configure_model()
        assert self.model is not None
        return self.model

    @abstractmethod
    def editor(self) -> TrainedEditor:
        """This module as an editor (contract of modules/editor.py)."""

    @contextmanager
    def original(self) -> Iterator[Backbone]:
        """The unedited model as a backbone: what locality is measured against. Here nothing ever changes it."""
        yield self.built.backbone

    # ------------------------------------------------------------------ training

    def hold(self, frozen: Any, keep_dtype: bool = False) -> None:
        """Bring a frozen model to the device; ZeRO, which may share out its weights, does so its own way."""
        hold = getattr(self.trainer.strategy, "hold", None)
        hold(frozen, keep_dtype=keep_dtype) if hold else frozen.to(self.device)

    def register_external(self, parameters: Iterable[Tensor | None]) -> None:
        """Tell such a strategy of parameters that are read outside their own modules' forward passes."""
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "register_external"):
            strategy.register_external([p for p in parameters if p is not None])

    @abstractmethod
    def losses(self, batch: Any) -> dict[str, Tensor]:
        """The loss and its parts for one micro-batch."""

    def step_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """`losses` of a step of training."""
        return self.losses(batch)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        parts = self.step_losses(batch, batch_idx)
        values = torch.stack([value.detach().float() for value in parts.values()])
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if (self.trainer.global_step + 1) % every == 0:
            # all parts in one message, and only where they are written down: ranks wait for each other at each
            values = self.trainer.strategy.reduce(values, reduce_op="mean")
        for name, value in zip(parts, values, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=len(batch))
        return parts["loss"]

    def scheduled(self, optimizer: Optimizer, share: Callable[[int], float]) -> Any:
        """An optimizer whose rates follow `share` of the step, for Lightning."""
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self.metrics = EditMetrics.of(data.validation_records()).to(self.device)  # all ranks' records on every rank
        if self._answers is None:  # the original never changes: it is asked once in a run
            self._answers = Answers(Edited(self.built.backbone))

    def validation_losses(self, records: Sequence[EditRecord]) -> dict[str, Tensor]:
        """Losses to be logged of a pool of validation records."""
        return {}

    def look(self, edited: Any, records: Sequence[EditRecord]) -> None:
        """Called with each pool's edited model."""

    def validation_step(self, batch: RecordPool, batch_idx: int) -> None:
        """One pool of validation records: `validation_losses`, then all edits together by the same protocols as
        `trainers.evaluate`."""
        assert self._answers is not None
        assert self.metrics is not None
        for name, value in self.validation_losses(batch.records).items():
            self.log(f"val/{name}", value, batch_size=len(batch.records), sync_dist=True)
        with self.original() as backbone:
            self._answers.model = Edited(backbone)
            self._answers.ask(batch.records, self.exact_match)
        requests = [r for record in batch.records for r in record.requests]
        with self.editor().edit(self.built.backbone, requests) as edited:
            self.metrics.update(evaluate_pool(edited, self._answers, batch.records, self.exact_match))
            self.look(edited, batch.records)

    def on_validation_epoch_end(self) -> None:
        assert self.metrics is not None
        for name, value in self.metrics.compute().items():
            self.log(f"val/{name}", value, prog_bar=name == "reliability/token_accuracy", sync_dist=True)

    def may_log(self) -> set[str]:
        """Metrics of validation that the pools of the sanity check may lack: some records have queries of a kind, and
        others have none."""
        assert self.metrics is not None
        return {f"val/{n}" for n in self.metrics.names if self.exact_match or not n.endswith("/exact_match")}

    # ------------------------------------------------------------------ checkpoints

    @abstractmethod
    def trained_names(self) -> set[str]:
        """The tensors of a checkpoint."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self.trained_names()
        checkpoint["state_dict"] = {n: t for n, t in checkpoint["state_dict"].items() if n in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.configure_model()
        if "state_dict" not in checkpoint:
            return  # of a strategy that loads, and checks, by itself
        names = self.trained_names()
        if set(checkpoint["state_dict"]) != names:
            raise ValueError(misfit(names, checkpoint["state_dict"]))
