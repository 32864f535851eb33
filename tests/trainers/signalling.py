"""Runs of the command line in processes of their own, and a signal that comes at a known step.

python signalling.py ARGUMENTS [-- ARGUMENTS ...]     several fits in the same processes, which is faster
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import lightning as L

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUN = (
    "--config=incomes_tiny",
    "--model.init_args.optimizer.decay_steps=20",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)
DDP = ("--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true")
ZERO = ("--trainer.devices=2", "--config=zero2_cpu")


class SignalAt(L.Callback):
    """Sends a real signal in the middle of a step: to a rank's process, to the one that started it, or to the whole
    group of processes."""

    def __init__(
        self,
        step: int,
        name: Literal["SIGTERM", "SIGUSR1"] = "SIGTERM",
        rank: int = 0,
        parent: bool = False,
        group: bool = False,
    ) -> None:
        self.step, self.name, self.rank, self.parent, self.group = step, name, rank, parent, group

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            target = -os.getpgrp() if self.group else os.getppid() if self.parent else os.getpid()
            # by another process, since torch's workers take SIGTERM in another way where their parent sends it
            kill = f"import os; os.kill({target}, {signal.Signals[self.name].value})"
            subprocess.run([sys.executable, "-c", kill], check=False)


def signal_at(step: int, **options: Any) -> list[str]:
    """The arguments that put a `SignalAt` into a run."""
    given = [f"--trainer.callbacks.{name}={value}" for name, value in {"step": step, **options}.items()]
    return ["--trainer.callbacks+=signalling.SignalAt", *given]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what launchers leave in it, for a new process that finds this module."""
    left = ("LOCAL_", "RANK", "WORLD_", "NODE_", "MASTER_", "PL_", "SLURM_", "TORCHELASTIC_", "PALIMPSEST_LEADER")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    path = os.pathsep.join([str(Path(sys.executable).parent), clean["PATH"]])
    return (
        clean
        | {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        | more
    )


def run(*command: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, run from the folder of the repository."""
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=180, check=False
    )


if __name__ == "__main__":
    from trainers.fit import main
    from trainers.processes import end_group

    given = sys.argv[1:]
    while given:
        end = given.index("--") if "--" in given else len(given)
        main(given[:end])
        given = given[end + 1 :]
    end_group()
