"""What a training run says when it has ended: where it lies, and the commands that come next."""

import json
import shlex
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from datamodules.edits import EditDataModule
from datamodules.sources import Source
from modules.trained import DistillMIKE
from trainers.callbacks.preemption import checkpoints
from trainers.checkpoints.folder import whole
from trainers.cli import TrainingCLI


def next_steps(cli: TrainingCLI) -> str:
    """The newest checkpoint and the best, and commands for TensorBoard, export and evaluation, one a line, as they can
    be pasted."""
    trainer, run_dir = cli.trainer, Path(cli.config.run_dir)
    saved = checkpoints(trainer)
    found = whole(saved.folder)
    out = Path("exported") / run_dir.resolve().name
    lines = []
    if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        lines.append(("look at it:", ["tensorboard", "--logdir", str(run_dir)]))
    if found:
        export = ["python", "-m", "trainers.export", "--run_dir", str(run_dir), "--out", str(out)]
        lines.append(("export it:", export))
        lines.append(("evaluate it:", evaluation(cli, out, run_dir / "results.json")))
    kept = f"the run is in {run_dir}, its newest checkpoint is {found[0]}" if found else f"the run is in {run_dir}"
    best = [path for path in map(saved.folder.joinpath, saved.best()[:1]) if path in found[1:]]
    kept += f", the best by {saved.monitor} is {best[0]}" if best else ""
    return "\n".join([kept, *(f"  {what:<13} {shlex.join(command)}" for what, command in lines if command)])


def evaluation(cli: TrainingCLI, editor: Path, out: Path) -> list[str]:
    """The command that evaluates an export on the run's test records, if there are any: one by one for editors of
    single edits, and for DistillMIKE all those that it holds, at once."""
    data = cli.datamodule
    if not isinstance(data, EditDataModule) or not data.test:
        return []
    sources = json.dumps([_given(source) for source in data.test], ensure_ascii=False)
    command = ["python", "-m", "trainers.evaluate", "--editor", str(editor), "--data", sources, "--out", str(out)]
    if isinstance(cli.model, DistillMIKE):
        held = str(len(cli.model.requests))
        command += ["--records", held, "--pool_sizes", held]
    elif max(data.pool_sizes) == 1:
        command += ["--mode", "single"]
    return command


def _given(source: Source) -> dict[str, Any]:
    """A source as a config has it, without its defaults."""
    plain = asdict(Source(source.format))
    return {f.name: v for f in fields(source) if (v := getattr(source, f.name)) != plain[f.name] or f.name == "format"}
