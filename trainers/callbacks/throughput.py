"""How fast the whole job trains, how much of its batches is padding, and how much memory it takes."""

import time
from typing import Any

import lightning as L
import psutil
import torch
from lightning.fabric.utilities.throughput import Throughput as Window
from torch import Tensor


class Throughput(L.Callback):
    """Logs, every `log_every_n_steps` of the Trainer,

    - train/tokens_per_second, train/queries_per_second: of all ranks together, over a sliding window of optimizer steps
      from the first full one on. Tokens are those the student reads, without padding: every `..._mask` of the batch
      (edits and queries). Queries are the batch's length.
    - train/padding_share: padded positions among the `..._mask` and `..._blocks` (teacher) of the last optimizer step.
    - train/memory_gib: of the fullest rank: the most that CUDA has allocated, without CUDA the process's resident set.

    The clock runs while batches are loaded and trained on; it stands from a batch's end to the next one's start where
    a validation or a checkpoint came between.

    Args:
        window: optimizer steps that a rate is an average of.
    """

    def __init__(self, window: int = 10) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 optimizer step, got {window}")
        self.window = window

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._rates = Window(window_size=self.window + 1)
        self._rates.update(time=0.0, batches=0, samples=0, lengths=0)
        self._step, self._steps, self._seconds = trainer.global_step, 0, 0.0
        self._tokens = self._queries = 0
        self._counts = torch.zeros(4, dtype=torch.long)  # tokens, queries, padding, positions of this optimizer step
        self._last = time.perf_counter()
        self._interrupted = False

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._interrupted = True

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._interrupted = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._interrupted:
            self._last = time.perf_counter()
        self._interrupted = False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        counts = count(batch)
        self._counts = self._counts.to(counts.device) + counts
        stepped = trainer.global_step > self._step
        # tolist waits for the device, so that the clock is read when the step is really done
        job = trainer.strategy.reduce(self._counts, reduce_op="sum").tolist() if stepped else None
        now = time.perf_counter()
        self._seconds, self._last = self._seconds + now - self._last, now
        if job is not None:
            self._step = trainer.global_step
            self._counts = torch.zeros_like(self._counts)
            pl_module.log_dict(self._values(*job))
            memory = memory_gib(pl_module.device)
            pl_module.log("train/memory_gib", memory, sync_dist=trainer.world_size > 1, reduce_fx="max")

    def _values(self, tokens: int, queries: int, padding: int, positions: int) -> dict[str, float]:
        """The job's figures after an optimizer step with these counts."""
        self._steps += 1
        self._tokens += tokens
        self._queries += queries
        self._rates.update(time=self._seconds, batches=self._steps, samples=self._queries, lengths=self._tokens)
        rates = self._rates.compute()
        names = {"items": "tokens", "samples": "queries"}  # counted over all ranks already: one "device" is the job
        found = {f"train/{name}_per_second": rates.get(f"device/{key}_per_sec") for key, name in names.items()}
        values = {name: float(rate) for name, rate in found.items() if rate is not None}
        return values | {"train/padding_share": padding / positions}


def count(batch: Any) -> Tensor:
    """Student tokens, queries, padded positions and all positions of a micro-batch: int64 [4], on its device.

    Raises:
        ValueError: for a batch without a tensor named `..._mask`.
    """
    tensors = {k: v for k, v in vars(batch).items() if isinstance(v, Tensor)}
    masks = [v for k, v in tensors.items() if k.endswith("_mask")]
    if not masks:
        raise ValueError(f"{type(batch).__name__} has no tensor named ..._mask, so its tokens cannot be counted")
    tokens = torch.stack([m.count_nonzero() for m in masks]).sum()
    blocks = [v for k, v in tensors.items() if k.endswith("_blocks")]
    passes = getattr(batch, "passes", None)  # rows of like length, which are cut to the longest of each part
    positions = sum((b - a) * width for a, b, width in passes) if passes else sum(t.numel() for t in (*masks, *blocks))
    filled = torch.stack([t.count_nonzero() for t in (*masks, *blocks)]).sum()
    counts = [tokens, torch.full_like(tokens, len(batch)), positions - filled, torch.full_like(tokens, positions)]
    return torch.stack(counts)


def memory_gib(device: torch.device) -> float:
    """Peak of what CUDA has allocated on the device so far, or this process's resident set, in GiB."""
    used = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    return used / 2**30
