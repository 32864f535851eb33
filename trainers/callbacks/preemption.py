"""Pre-emption: a signal comes, the optimizer step is finished, a checkpoint saved, and the exit code says so."""

import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, cast

import lightning as L
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Checkpoint

from trainers.callbacks.save_checkpoints import SaveCheckpoints

PREEMPTED = 143  # exit code: the run was told to end, and its checkpoint is whole
REPEAT = 1.0  # seconds in which a signal may come twice: to the whole process group, and passed on by a launcher


class Preemption(Checkpoint):
    """Ends the run with a checkpoint when a signal asks for it.

    A signal that any rank gets ends all ranks at the end of the optimizer step: a checkpoint is saved as
    `SaveCheckpoints` does, rank 0 says in one line how to go on, and the program ends with exit code 143, whatever the
    signal was. (Ranks that Lightning itself started beside the first one of a machine end with 0, since Lightning would
    kill the first one for any other code of theirs.) It costs one number, exchanged by all ranks, per optimizer step.

    - Before training, while models load and the untrained editor is evaluated, a signal does what it does by default.
    - During a validation or a save it waits for the end of the next optimizer step. Whoever sends it (such as SLURM,
      `--signal`) should thus leave time for a validation, a step and a save.
    - In the last optimizer step it ends nothing, and later it does nothing: what is left is the run's own ending.
    - A second signal does at once what it does by default.

    Lightning's own handlers are not installed. They communicate within the handler, which can deadlock with what the
    step communicates, and under SLURM they save and requeue by themselves.

    It is a `Checkpoint` because Lightning calls those after all other callbacks.

    Args:
        signals: names of the signals. SIGUSR1 is what SLURM sends by `--signal=SIGUSR1@180`. With SIGINT among them
            ctrl-C saves a checkpoint too.

    Raises:
        ValueError: for a name that is none of a signal, and in a run without `SaveCheckpoints`.
    """

    def __init__(
        self, signals: Sequence[Literal["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"]] = ("SIGTERM", "SIGUSR1")
    ) -> None:
        unknown = sorted(set(signals) - set(signal.Signals.__members__))
        if unknown:
            raise ValueError(f"preemption.signals: there is no signal {', '.join(unknown)}")
        self.signals = [signal.Signals[name] for name in signals]
        self._before: dict[signal.Signals, Any] = {}  # the handlers that were there
        self._received = 0
        self._at = 0.0
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            checkpoints(trainer)
            cast(Any, trainer)._signal_connector.register_signal_handlers = _register_nothing

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._received, self._step = 0, trainer.global_step
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._receive) or signal.SIG_DFL for number in self.signals}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        strategy = trainer.strategy
        received = int(strategy.reduce(torch.tensor(self._received, device=strategy.root_device), reduce_op="max"))
        if received:
            saved = checkpoints(trainer).save(trainer)
            if not is_last_step(trainer):
                self._end(trainer, f"{signal.Signals(received).name}: saved {saved}; go on with --ckpt_path last")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._restore()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._restore()

    def _receive(self, number: int, frame: Any) -> None:
        """Handle a signal: note it, or, if it is the second one, do what was done before there was a callback."""
        now = time.monotonic()
        if not self._received:
            self._received, self._at = number, now
        elif now - self._at >= REPEAT:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)

    def _end(self, trainer: L.Trainer, why: str) -> NoReturn:
        cast(Any, trainer)._logger_connector.update_train_step_metrics()  # Lightning's next act, had the run gone on
        for logger in trainer.loggers:
            logger.save()
        trainer.strategy.barrier("preempted")  # the first rank that ends may be the end of the others
        if trainer.is_global_zero:
            print(f"{why} (exit code {PREEMPTED})", flush=True)
        sys.exit(exit_code(trainer))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def checkpoints(trainer: L.Trainer) -> SaveCheckpoints:
    """The callback that saves this run's checkpoints.

    Raises:
        ValueError: if there is none.
    """
    found = [c for c in cast(Any, trainer).callbacks if isinstance(c, SaveCheckpoints)]
    if not found:
        raise ValueError("Preemption saves by way of SaveCheckpoints: add that to trainer.callbacks")
    return found[0]


def is_last_step(trainer: L.Trainer) -> bool:
    """Whether the run ends with the optimizer step that has just been made."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return trainer.global_step == trainer.max_steps or (trainer.is_last_batch and last_epoch)


def exit_code(trainer: L.Trainer) -> int:
    """What this rank ends with: 143, but 0 for one that Lightning has started."""
    by_lightning = isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment)
    return 0 if by_lightning and trainer.local_rank else PREEMPTED


def _register_nothing() -> None:
    pass
