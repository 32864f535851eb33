"""The dry run as a command: what a configuration needs and whether it fits."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from trainers.cli import TrainingCLI, fail
from trainers.estimate.cards import KNOWN, Card, named, sized
from trainers.estimate.remedies import refuse
from trainers.estimate.report import show
from trainers.estimate.totals import estimate


class _Parsed(TrainingCLI):
    """A configuration without its Trainer, which would look for the GPUs it is configured for."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None


def main(args: Sequence[str] | None = None) -> None:
    """Parse, estimate, print; ends the program with exit code 1 and the remedies where the run does not fit."""
    own, rest = _own().parse_known_args(sys.argv[1:] if args is None else args)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        cli = parsed(rest)
        found = estimate(cli, _gpus(cli) if own.gpus is None else own.gpus, _card(cli, own.gpu, own.gpu_memory))
        show(found)
        refuse(found)
    except (FileNotFoundError, FileExistsError, ValueError, MisconfigurationException) as error:
        fail(error)


def parsed(args: Sequence[str]) -> TrainingCLI:
    """The configuration that these arguments of `trainers.fit` give, on a machine with or without its GPUs."""
    return _Parsed(list(args))


def _own() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.estimate",
        description="What a training run needs: parameters, memory by component, expected tokens/s. Loads no weights "
        "and starts no process. All other arguments are those of trainers.fit (--config NAME, --a.b.c value).",
        allow_abbrev=False,
    )
    parser.add_argument("--gpus", type=int, help="of the whole job (default: trainer.devices x trainer.num_nodes)")
    parser.add_argument("--gpu", help=f"a card by name: {', '.join(KNOWN)}; cpu: this machine")
    parser.add_argument("--gpu_memory", type=float, help="GiB of a card that has no name here; its speed is not known")
    return parser


def _gpus(cli: TrainingCLI) -> int:
    trainer: Any = cli.config["trainer"]
    devices = trainer["devices"]
    try:
        count = len(devices) if isinstance(devices, list) else int(devices)
        if count < 1:  # -1 is Lightning's for all there are
            raise ValueError
        return count * int(trainer["num_nodes"])
    except (TypeError, ValueError):
        raise ValueError(f"trainer.devices is {trainer['devices']!r}: say how many with --gpus") from None


def _card(cli: TrainingCLI, name: str | None, memory: float | None) -> Card:
    if name and memory:
        raise ValueError("give --gpu or --gpu_memory, not both")
    if memory is not None:
        return sized(memory)
    if name is None and cli.config["trainer"]["accelerator"] != "cpu":
        raise ValueError("say which card with --gpu NAME (such as h100), or its memory with --gpu_memory GIB")
    return named(name or "cpu")
