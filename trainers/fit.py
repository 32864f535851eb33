"""Train an editor: `python -m trainers.fit --config incomes_smollm2.yaml [--a.b.c value ...]`.

With --dry_run it only says what the run would need, as `python -m trainers.estimate` does with the same arguments.
"""

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from datamodules.readers.errors import DataError
from modules.backbone import BackboneError
from trainers import estimate
from trainers.callbacks.non_finite import NonFiniteError
from trainers.callbacks.preemption import PREEMPTED
from trainers.checkpoints.folder import CheckpointError
from trainers.cli import CONFIGS, fail, is_rank_zero, parse, rank
from trainers.next_steps import next_steps
from trainers.processes import end_group, end_with_parent

DRY_RUN = "--dry_run"


def main(args: Sequence[str] | None = None) -> None:
    end_with_parent()
    wanted = sys.argv[1:] if args is None else list(args)
    if DRY_RUN in wanted:
        estimate.main([arg for arg in wanted if arg != DRY_RUN])
        return
    cli = parse(args)
    try:
        cli.check()
        checkpoint = cli.checkpoint()
    except (ValueError, FileNotFoundError, FileExistsError) as error:  # CheckpointError is a ValueError
        fail(error)
    try:
        # weights_only stays on: a checkpoint is data, and loading it runs no code
        cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
    except (ValueError, NonFiniteError) as error:  # perhaps of this rank alone
        if not meant(error):
            raise
        sys.exit(f"error: {error}" if is_rank_zero() else f"error on rank {rank()}: {error}")
    if cli.trainer.is_global_zero and not cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        print(next_steps(cli), flush=True)


def meant(error: Exception) -> bool:
    """Whether a `raise` of this project's own ended the training: its message then says what to change, and the way
    there is of no use. What a library or a builtin refused is a fault, whose traceback is wanted. A process that loads
    data has its errors raised again by torch, so that some are known by their kind."""
    if isinstance(error, (BackboneError, CheckpointError, DataError, NonFiniteError)):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1]
    return Path(last.filename).is_relative_to(CONFIGS.parent) and (last.line or "").startswith("raise ")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code in (0, PREEMPTED):
            end_group(end.code)
        raise
    end_group()
