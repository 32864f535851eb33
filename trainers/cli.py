"""The command line: LightningCLI with bare config names, one run folder, and errors that say what to do."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def find_config(name: str) -> str:
    """A config file by path, or by bare name in configs/ (with or without .yaml), from any working directory.

    Raises:
        FileNotFoundError: naming what there is.
    """
    candidates = [Path(name), *(CONFIGS / f"{name}{suffix}" for suffix in ("", ".yaml"))]
    for candidate in candidates:
        if candidate.is_file():
            return str(candidate)
    known = sorted(p.relative_to(CONFIGS).as_posix() for p in CONFIGS.rglob("*.yaml"))
    raise FileNotFoundError(
        f"no config {name!r}, neither as a path nor in {CONFIGS.name}/; there are: {', '.join(known)}"
    )


def resolve_configs(args: Sequence[str]) -> list[str]:
    """The arguments with every `--config NAME` turned into a path."""
    resolved: list[str] = []
    follows = False
    for arg in args:
        if follows:
            arg = find_config(arg)
        elif arg.startswith("--config="):
            arg = f"--config={find_config(arg.removeprefix('--config='))}"
        follows = arg == "--config"
        resolved.append(arg)
    return resolved


class TrainingCLI(LightningCLI):
    """Trainer, model and data from YAML and the command line, without running anything.

    Adds two keys. `run_dir`: the folder of the run, which holds config.yaml, checkpoints/ and TensorBoard's files.
    `ckpt_path`: what to continue from: a checkpoint, or `last`, the newest one of the run folder, if there is any.
    """

    def __init__(self, args: Sequence[str] | None = None) -> None:
        if args is None:
            sys.argv[1:] = resolve_configs(sys.argv[1:])
        # a command of ours that builds a run from its config has arguments of its own
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            run=False,
            args=None if args is None else resolve_configs(args),
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"description": "Meta-train a knowledge editor."},
            trainer_defaults={
                "use_distributed_sampler": False,  # the DataModule plans every rank's micro-batches
                "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "", "name": "", "version": ""}},
            },
            seed_everything_default=0,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="folder of this run")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to continue from, or: last")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.filename": "step{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.save_last": True,
                "checkpoint.mode": "max",
                "checkpoint.save_on_exception": True,
            }
        )
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=lambda folder: f"{folder}/checkpoints")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "trainer.logger.init_args.save_dir")

    def checkpoint(self) -> str | None:
        """The checkpoint to continue from. Says in one line what happens; refuses to write over an earlier run.

        Raises:
            FileNotFoundError: for a path at which there is nothing.
            FileExistsError: where the run folder has checkpoints and nothing is said about them.
        """
        folder = Path(self.config.run_dir) / "checkpoints"
        wanted = self.config.ckpt_path
        there = sorted(folder.glob("*.ckpt"), key=lambda p: p.stat().st_mtime)
        if wanted is None:
            if there:
                raise FileExistsError(
                    f"{folder} holds checkpoints of an earlier run. Continue it with --ckpt_path last, or choose "
                    f"another folder with --run_dir."
                )
            return None
        if wanted != "last":
            if not Path(wanted).exists():
                raise FileNotFoundError(f"--ckpt_path {wanted}: there is no such checkpoint")
            return wanted
        last = folder / "last.ckpt"
        chosen = last if last.exists() else (there[-1] if there else None)
        print(f"continuing from {chosen}" if chosen else f"no checkpoint in {folder} yet: starting from the beginning")
        return str(chosen) if chosen else None


def parse(args: Sequence[str] | None = None) -> TrainingCLI:
    """Parse and build; errors about files end the program with one line rather than a traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return TrainingCLI(args)
    except (FileNotFoundError, FileExistsError, ValueError) as error:
        sys.exit(f"error: {error}")
