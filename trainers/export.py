"""Turn a run's checkpoint into an editor: `python -m trainers.export --run_dir runs/NAME --out DIR`."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import torch

from modules.export import export as write
from trainers.callbacks.preemption import checkpoints
from trainers.callbacks.save_checkpoints import SaveCheckpoints, ranked, read_scores
from trainers.checkpoints import single
from trainers.checkpoints.folder import CheckpointError, newest, verify, whole
from trainers.cli import TrainingCLI
from trainers.command import run


def export(run_dir: str, out: str, checkpoint: str = "best", metrics: str | None = None) -> None:
    """Write a checkpoint of a run as a folder of safetensors that loads as an editor.

    Args:
        run_dir: the run's folder, with its config.yaml.
        out: the folder to write; it must not exist, or be empty.
        checkpoint: `best`, the best that the run has kept by its checkpoint.monitor, or without one the newest; `last`,
            the newest; or a path.
        metrics: results of trainers.evaluate whose aggregate goes into editor.json; by default the run's own
            evaluation.json, if there is one. Those of another step than the checkpoint's are left out.
    """
    config = Path(run_dir) / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{run_dir} holds no config.yaml: give the folder of a run made by trainers.fit")
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another folder with --out, or remove it")
    own = Path(run_dir) / "evaluation.json"
    results = read_results(Path(metrics), "--metrics ") if metrics else read_results(own) if own.is_file() else None
    # the machine that exports need not be the one that trained
    here = [
        "--trainer.accelerator=cpu",
        "--trainer.devices=1",
        "--trainer.num_nodes=1",
        "--trainer.strategy=auto",
        "--trainer.precision=32-true",
    ]
    cli = TrainingCLI([f"--config={config}", *here])
    folder = Path(run_dir) / "checkpoints"
    path = chosen(folder, checkpoint, checkpoints(cli.trainer))
    manifest = verify(path)
    cli.model.teaches = False
    fill(cli.model, path, manifest["kind"])
    step = int(manifest["step"])
    wrong = why_left_out(results, step, must_tell=not metrics) if results else None
    if wrong:
        print(f"{metrics or own} is left out of editor.json: {wrong}")
    about = {
        "step": step,
        "data": cli.config.data.as_dict() if "data" in cli.config else {},
        "metrics": results["aggregate"] if results and not wrong else None,
    }
    write(cli.model, target, about)
    print(f"wrote {target} (step {step}); python -m trainers.edit --editor {target} edits with it")


def read_results(path: Path, flag: str = "") -> dict[str, Any]:
    """Results of trainers.evaluate or of a run's own evaluation, checked before a checkpoint is read.

    Args:
        flag: what a user set the file by, for the message.

    Raises:
        ValueError: for a file that cannot be read, or holds no such results; it names the file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{flag}{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{flag}{path} is no JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("aggregate"), dict):
        raise ValueError(f"{flag}{path} holds no results of trainers.evaluate, which are an object with `aggregate`")
    return found


def why_left_out(results: dict[str, Any], step: int, must_tell: bool) -> str | None:
    """Why results are not of a step; None where they are, or do not tell and need not.

    Args:
        must_tell: whether they must tell their step, as a run's own do; those that a user names may be of an export.
    """
    meta = results.get("meta")
    told = meta.get("step") if isinstance(meta, dict) else None
    if told is None:
        return "it tells no step of a trained editor (--metrics takes it all the same)" if must_tell else None
    return None if told == step else f"it is of step {told}, the checkpoint of step {step}"


def chosen(folder: Path, checkpoint: str, saves: SaveCheckpoints) -> Path:
    """A checkpoint by path, or the best or the newest whole one of a folder, with a line that says which, and one for
    each that is passed over.

    Args:
        saves: how the run told the best.

    Raises:
        FileNotFoundError: where there is none.
    """
    if checkpoint not in ("best", "last"):
        return Path(checkpoint)
    if checkpoint == "best" and saves.monitor:
        there, scores = whole(folder), read_scores(folder)
        for name in ranked(scores, saves.mode):
            if folder / name in there:
                print(f"taking {name}, the best by {saves.monitor} ({scores[name]:.4g})")
                return folder / name
            print(f"{folder / name}, whose {saves.monitor} is better, is missing or damaged; passing over it")
        print(f"no checkpoint here has a score by {saves.monitor}")
    path, warnings = newest(folder)
    for line in warnings:
        print(line)
    if path is None:
        raise FileNotFoundError(f"there is no whole checkpoint in {folder}")
    print(f"taking {path.name}, the newest")
    return path


def fill(module: L.LightningModule, path: Path, kind: str) -> None:
    """Put a checkpoint's trained tensors into a module, one after the other.

    Args:
        kind: "file", of one process or DDP, or "zero", of DeepSpeed's shards.

    Raises:
        CheckpointError: where they do not fit.
    """
    module.on_load_checkpoint(besides(path, kind))  # which builds the module
    names: set[str] = module.trained_names()  # type: ignore[operator]
    places = dict(module.named_parameters()) | dict(module.named_buffers())
    if kind == "zero":
        from trainers.checkpoints import zero  # DeepSpeed takes seconds to import

    saved = zero.tensors(path) if kind == "zero" else single.tensors(path)
    found = set()
    with torch.no_grad():
        for name, tensor in saved:
            if name in names:
                found.add(name)
                places[name].copy_(tensor)
    if found != names:
        lacking = sorted(names - found)
        raise CheckpointError(
            f"{path} lacks {len(lacking)} trained tensors ({', '.join(lacking[:3])}): use the config.yaml of its run"
        )


def besides(path: Path, kind: str) -> dict[str, Any]:
    """What a checkpoint holds besides tensors of the module and states of its training, such as DistillMIKE's edits."""
    if kind == "zero":
        from trainers.checkpoints.zero import TAG

        file = sorted((path / TAG).glob("*mp_rank_00_model_states.pt"))[0]
        state = torch.load(file, map_location="cpu", weights_only=True)
    else:
        state = single.FolderIO().load_checkpoint(path)
    return {k: v for k, v in state.items() if k not in ("state_dict", "module", "optimizer", "optimizer_states")}


if __name__ == "__main__":
    run(export)
