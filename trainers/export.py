"""Turn a run's checkpoint into an editor: `python -m trainers.export --run_dir runs/NAME --out DIR`."""

import json
from pathlib import Path

import torch

from modules.export import export as write
from trainers.cli import TrainingCLI
from trainers.command import run


def export(run_dir: str, out: str, checkpoint: str = "last", metrics: str | None = None) -> None:
    """Write a checkpoint of a run as a folder of safetensors that loads as an editor.

    Args:
        run_dir: the run's folder, with its config.yaml.
        out: the folder to write; it must not exist, or be empty.
        checkpoint: `last`, or a path.
        metrics: an evaluation.json whose aggregate goes into editor.json; by default the run's own, if there is one.
    """
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{run_dir} holds no config.yaml: give the folder of a run made by trainers.fit")
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder with --out, or remove it")
    file = Path(run_dir) / "checkpoints" / "last.ckpt" if checkpoint == "last" else Path(checkpoint)
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}")
    # the machine that exports need not be the one that trained
    here = [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.strategy=auto",
        "--trainer.precision=32-true",
    ]
    cli = TrainingCLI([f"--config={config}", *here])
    saved = torch.load(file, map_location="cpu", weights_only=True)
    cli.model.on_load_checkpoint(saved)
    cli.model.load_state_dict(saved["state_dict"], strict=False)
    results = Path(metrics) if metrics else Path(run_dir) / "evaluation.json"
    about = {
        "step": int(saved["global_step"]),
        "data": cli.config.data.as_dict() if "data" in cli.config else {},
        "metrics": json.loads(results.read_text(encoding="utf-8")).get("aggregate") if results.is_file() else None,
    }
    write(cli.model, target, about)
    print(f"wrote {target} (step {about['step']}); python -m trainers.edit --editor {target} edits with it")


if __name__ == "__main__":
    run(export)
