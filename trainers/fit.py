"""Train an editor: `python -m trainers.fit --config incomes_smollm2.yaml [--a.b.c value ...]`."""

import sys
from collections.abc import Sequence

from trainers.cli import parse


def main(args: Sequence[str] | None = None) -> None:
    cli = parse(args)
    try:
        checkpoint = cli.checkpoint()
    except (FileNotFoundError, FileExistsError) as error:
        sys.exit(f"error: {error}")
    # weights_only stays on: a checkpoint is data, and loading it runs no code
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)


if __name__ == "__main__":
    main()
