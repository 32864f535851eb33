"""When checkpoints are saved, and which are kept."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from trainers.checkpoints.folder import CheckpointError, clear_partials, remove, whole, write

SCORES = "scores.json"


class SaveCheckpoints(Checkpoint):
    """Saves `step<N>.ckpt` after optimizer steps, and keeps the newest one and the best `top_k` by a metric.

    A checkpoint is saved before the validation of its step, and gets that validation's score, noted in scores.json
    beside it. Where a validation comes at a step that is not saved, its step is saved if it belongs to the best. The
    intervals of saving and of validation are thus free. A checkpoint without a score is kept as the newest only. An old
    checkpoint is removed when the one that supersedes it is whole.

    A run that goes on from a step does not validate that step: where its validation had not ended, the checkpoint stays
    without a score.

    An exception saves nothing, ctrl-C included: it may come in the middle of a step, where some weights are new and
    some are old. What is to be saved before the end of a run calls `save` at the end of a step.

    Args:
        dirpath: the folder of the checkpoints.
        every_n_steps: save after so many optimizer steps; None: only at the end, and the best.
        monitor: name of a logged metric, such as val/reliability/token_accuracy. None: keep only the newest one.
        mode: which scores are better.
        top_k: how many of the best are kept.
        at_end: save after the last step.

    Raises:
        ValueError: for settings that do not go together; it names them.
    """

    def __init__(
        self,
        dirpath: str,
        every_n_steps: int | None = None,
        monitor: str | None = None,
        mode: Literal["max", "min"] = "max",
        top_k: int = 1,
        at_end: bool = True,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"checkpoint.mode must be max or min, got {mode!r}")
        if (every_n_steps is not None and every_n_steps < 1) or top_k < 1:
            raise ValueError(f"checkpoint.every_n_steps and top_k must be at least 1, got {every_n_steps} and {top_k}")
        if monitor is None and top_k > 1:
            raise ValueError(f"checkpoint.top_k is {top_k}: set checkpoint.monitor, by which the best are known")
        self.folder = Path(dirpath)
        self.every_n_steps, self.monitor, self.mode, self.top_k = every_n_steps, monitor, mode, top_k
        self.at_end = at_end
        # the same on all ranks, so that all decide the same, whatever rank 0 is removing
        self.names: list[str] = []  # the newest last
        self.scores: dict[str, float] = {}
        self._saved: int | None = None  # the step that needs no saving
        self._step = 0
        self._stepped = False  # False: in the middle of an accumulation
        self._then: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        found = None
        if trainer.is_global_zero:
            clear_partials(self.folder)
            found = [path.name for path in reversed(whole(self.folder))], read_scores(self.folder)
        self.names, scores = cast(tuple[list[str], dict[str, float]], trainer.strategy.broadcast(found))
        self.scores = {name: score for name, score in scores.items() if name in self.names}
        step = trainer.global_step
        self._step, self._stepped = step, False
        self._saved = step if step == 0 or self._path(step).name in self.names else None
        if self.names and self._then not in (None, self.state_dict()):
            rank_zero_warn(
                f"checkpoint.monitor or mode is another one now: the checkpoints in {self.folder} cannot be compared "
                "with new ones, and stay until you remove them"
            )
            self.names, self.scores = [], {}

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a metric of validation (val/...) that is never logged before steps are made. A module says by
        `may_log` which ones the first pools may lack; of one that does not, only the first validation can tell, and of
        metrics of training and of callbacks."""
        may_log: Callable[[], set[str]] | None = getattr(pl_module, "may_log", None)
        if self.monitor is not None and may_log is not None and self.monitor.startswith("val/"):
            logged = trainer.callback_metrics.keys() | may_log()
            if not trainer.strategy.broadcast(self.monitor in logged):
                raise _never_logged(self.monitor, logged)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self._stepped, self._step = step > self._step, step
        wanted = self.every_n_steps and step % self.every_n_steps == 0
        # the last step too, where it is known: so it is on disk, and gets a score, before evaluations after training
        if self._stepped and (wanted or (self.at_end and step == trainer.max_steps)) and not _dev_run(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        score, step = self._score(trainer, self.monitor), trainer.global_step
        saved = step == self._saved and self._path(step).name in self.names
        if _dev_run(trainer) or math.isnan(score) or not (saved or (self._stepped and self._is_among_best(score))):
            return
        name = self.save(trainer).name
        self.scores[name] = score
        self._prune(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.at_end and not _dev_run(trainer):
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> Path:
        """The checkpoint of the step that has just been made: saved, if it is not yet, and then the superseded ones
        removed. To be called on all ranks, between two optimizer steps.

        Raises:
            CheckpointError: if it cannot be written; no old one is removed then.
        """
        step = trainer.global_step
        path = self._path(step)
        if step != self._saved:
            trainer.save_checkpoint(path, weights_only=False)
            failure = getattr(trainer.strategy.checkpoint_io, "failure", None)
            if trainer.world_size > 1 and (text := trainer.strategy.broadcast(str(failure or ""))):
                raise CheckpointError(text)
            self._saved = step
            self.names = [name for name in self.names if name != path.name] + [path.name]
            self.scores.pop(path.name, None)  # of another run's state at this step
            self._prune(trainer)
        return path

    def state_dict(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._then = state_dict

    def best(self) -> list[str]:
        """The names of the `top_k` best checkpoints, the best first; of equal ones the earlier is better."""
        return ranked(self.scores, self.mode)[: self.top_k]

    def _is_among_best(self, score: float) -> bool:
        best = [self.scores[name] for name in self.best()]
        return len(best) < self.top_k or (score > best[-1] if self.mode == "max" else score < best[-1])

    def _prune(self, trainer: L.Trainer) -> None:
        """Write the scores, and remove all but the newest and the best."""
        keep = {*self.names[-1:], *self.best()}
        superseded = [name for name in self.names if name not in keep]
        self.names = [name for name in self.names if name in keep]
        self.scores = {name: score for name, score in self.scores.items() if name in keep}
        if not trainer.is_global_zero:
            return
        if self.monitor is not None:
            write_scores(self.folder, self.scores)
        for name in superseded:
            if problem := remove(self.folder / name):
                rank_zero_warn(problem)

    def _score(self, trainer: L.Trainer, monitor: str) -> float:
        """The monitored metric as rank 0 has it: a metric that is not synchronised must not part the ranks' ways."""
        metrics = trainer.callback_metrics
        score = trainer.strategy.broadcast(float(metrics[monitor]) if monitor in metrics else None)
        if score is None:
            raise _never_logged(monitor, metrics)
        return score

    def _path(self, step: int) -> Path:
        return self.folder / f"step{step}.ckpt"


def _never_logged(monitor: str, logged: Iterable[str]) -> CheckpointError:
    there = ", ".join(sorted(logged))
    return CheckpointError(f"checkpoint.monitor is {monitor!r}, which is never logged; there are: {there}")


def ranked(scores: Mapping[str, float], mode: str) -> list[str]:
    """The names of scored checkpoints, the best first; of equal ones the earlier is better."""
    return sorted(scores, key=lambda name: scores[name], reverse=mode == "max")


def read_scores(folder: Path) -> dict[str, float]:
    """{name of a checkpoint: its score}. None, where the file is missing or damaged: scores guide only what is kept."""
    try:
        scores = json.loads((folder / SCORES).read_text(encoding="utf-8"))
        return {str(name): float(score) for name, score in scores.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def write_scores(folder: Path, scores: dict[str, float]) -> None:
    """Write the scores, whole or not at all.

    Raises:
        CheckpointError: naming the file.
    """
    try:
        write(folder / SCORES, json.dumps(scores, indent=1) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"could not write {folder / SCORES}: {error.strerror}; the checkpoints are whole"
        ) from error


def _dev_run(trainer: L.Trainer) -> bool:
    return bool(cast(Any, trainer).fast_dev_run)
