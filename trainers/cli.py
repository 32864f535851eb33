"""The command line: LightningCLI with bare config names, one run folder, and errors that say what to do."""

import io
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainers.callbacks.non_finite import NonFinite
from trainers.callbacks.preemption import Preemption
from trainers.callbacks.progress_lines import ProgressLines
from trainers.callbacks.save_checkpoints import SaveCheckpoints
from trainers.callbacks.step_seed import StepSeed
from trainers.checkpoints.folder import CheckpointError, newest, read_manifest, verify, whole
from trainers.checkpoints.single import FolderIO
from trainers.usage import Plain, told

DESCRIPTION = (
    "Meta-train a knowledge editor: --config NAME, a YAML by path or by bare name in configs/, whose README.md lists "
    "them. Several are laid over one another, and --a.b.c VALUE over all. All keys of a config, the editor's and the "
    "data's too, each with what it means: --config NAME --print_config=comments. "
    "With --dry_run it says what the run would need, and runs nothing."
)
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


class TrainingParser(Plain, LightningArgumentParser):
    """LightningCLI's parser, with plain errors."""


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
            parser_kwargs={"prog": "python -m trainers.fit", "description": DESCRIPTION},
            trainer_defaults={
                "use_distributed_sampler": False,  # the DataModule plans every rank's micro-batches
                # weights that ZeRO-3 gathers in it stay inference tensors, which no gradient can be taken of: MEND's
                # edits need one in validation, and training after it
                "inference_mode": False,
                "logger": {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "", "name": "", "version": ""}},
            },
            seed_everything_default=0,
            parser_class=TrainingParser,
            auto_configure_optimizers=False,  # each module configures its own, by its keys
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default="runs/default", help="folder of this run")
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="checkpoint to continue from, or: last")
        parser.add_lightning_class_args(LearningRateMonitor, "lr_monitor")
        parser.add_lightning_class_args(NonFinite, "non_finite")
        parser.add_lightning_class_args(SaveCheckpoints, "checkpoint")
        parser.add_lightning_class_args(StepSeed, "step_seed")
        parser.add_lightning_class_args(Preemption, "preemption")
        parser.add_lightning_class_args(ProgressLines, "progress_lines")
        parser.link_arguments("run_dir", "checkpoint.dirpath", compute_fn=lambda folder: f"{folder}/checkpoints")
        parser.link_arguments("run_dir", "trainer.default_root_dir")
        parser.link_arguments("run_dir", "trainer.logger.init_args.save_dir")

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        accelerator = self.config.trainer.accelerator
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except MisconfigurationException as error:
            if accelerator not in ("gpu", "cuda") or torch.cuda.is_available():
                raise
            raise ValueError(
                f"trainer.accelerator is {accelerator}, and PyTorch finds no GPU here. Models of 1B parameters and "
                "more want some (trainers.estimate says how many); small ones train with --trainer.accelerator cpu "
                "--trainer.devices 1, as the configs *_tiny and *_smollm2 do"
            ) from error
        configured = trainer.strategy.checkpoint_io
        if type(configured) is TorchCheckpointIO:  # Lightning's default
            trainer.strategy.checkpoint_io = FolderIO()
        elif not isinstance(configured, FolderIO):
            raise ValueError(
                f"trainer.plugins has {type(configured).__name__}, which writes no manifest: its checkpoints could not "
                "be told from damaged ones. Take it out"
            )
        return trainer

    def check(self) -> None:
        """Refuse what can be known to be wrong before any process is started, data is read or a model is loaded.

        Raises:
            ValueError: naming the setting.
        """
        launcher = type(self.trainer.strategy.launcher).__name__
        if launcher == "_MultiProcessingLauncher":
            raise ValueError("trainer.strategy: spawned and forked processes are not supported; take ddp, or Zero")
        ranks = self.trainer.num_devices * self.trainer.num_nodes
        if hasattr(self.datamodule, "check"):
            self.datamodule.check(ranks)
        if hasattr(self.trainer.strategy, "check"):
            self.trainer.strategy.check()  # type: ignore[operator]
        if hasattr(self.model, "check"):
            self.model.check(self.trainer)  # type: ignore[operator]

    def checkpoint(self) -> str | None:
        """The checkpoint to continue from. Says in one line what happens; refuses to write over an earlier run.

        Rank 0 reads all of it to know that it is whole, the other ranks compare sizes; rank 0's choice is loaded.

        Raises:
            FileNotFoundError: for a path at which there is nothing.
            FileExistsError: where the run folder has checkpoints and nothing is said about them, or later ones.
            CheckpointError: for a damaged one, and where none is whole for `last`; it names the file.
        """
        folder = Path(self.config.run_dir) / "checkpoints"
        wanted = self.config.ckpt_path
        if wanted is None:
            if any(folder.glob("*.ckpt")):
                raise FileExistsError(
                    f"{folder} holds checkpoints of an earlier run. Continue it with --ckpt_path last, or choose "
                    f"another folder with --run_dir."
                )
            return None
        chosen = last(folder) if wanted == "last" else given(Path(wanted), folder)
        return str(chosen) if chosen else None


def last(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run. None where there is none at all yet.

    Raises:
        CheckpointError: where there are checkpoints and none is whole: to begin anew would be to write over them.
    """
    chosen, warned = newest(folder, hashes=is_rank_zero())
    if chosen is None and any(folder.glob("*.ckpt")):
        raise CheckpointError(f"{'; '.join(warned)}. Begin anew in another folder with --run_dir, or remove {folder}")
    if is_rank_zero():
        for line in warned:
            print(f"warning: {line}", file=sys.stderr)
        print(f"continuing from {chosen}" if chosen else f"no checkpoint in {folder} yet: starting from the beginning")
    return chosen


def given(path: Path, folder: Path) -> Path:
    """The checkpoint `path`, from which a run goes on that saves to `folder`.

    Raises:
        FileNotFoundError, FileExistsError, CheckpointError: as `TrainingCLI.checkpoint` does.
    """
    if not path.exists():
        raise FileNotFoundError(f"--ckpt_path {path}: there is no such checkpoint")
    try:
        step = verify(path, hashes=is_rank_zero())["step"]
    except CheckpointError as error:
        other, _ = newest(path.parent, hashes=is_rank_zero())
        remedy = f"the newest whole one there is {other}" if other else f"there is no whole one in {path.parent}"
        raise CheckpointError(f"--ckpt_path: {error}; {remedy}") from error
    later = [other.name for other in whole(folder) if read_manifest(other)["step"] > step]
    if later:
        raise FileExistsError(
            f"{folder} holds checkpoints of later steps than {path.name}: {', '.join(later)}. Continue from the newest "
            "with --ckpt_path last, choose another folder with --run_dir, or remove them."
        )
    return path


def rank() -> str:
    """This process's rank in its job, as the launcher says before the processes know each other."""
    if "RANK" not in os.environ and os.environ.get("NODE_RANK", "0") != "0":  # machines started by hand
        return f"{os.environ['NODE_RANK']}.{os.environ.get('LOCAL_RANK', '0')}"
    return next((os.environ[name] for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID") if name in os.environ), "0")


def is_rank_zero() -> bool:
    return rank() == "0"


def fail(error: Exception) -> NoReturn:
    """End the program with exit code 1 and one line: for what all ranks meet alike, so that only rank 0 need say it."""
    sys.exit(f"error: {told(error)}" if is_rank_zero() else 1)


def parse(args: Sequence[str] | None = None) -> TrainingCLI:
    """Parse and build; errors end the program with one line of rank 0's rather than a traceback of each rank."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with nullcontext() if is_rank_zero() else redirect_stderr(io.StringIO()):
            return TrainingCLI(args)
    except (FileNotFoundError, FileExistsError, ValueError, MisconfigurationException) as error:
        fail(error)
    except SystemExit as end:  # of jsonargparse, which has said why
        sys.exit(end.code if is_rank_zero() or not end.code else 1)
