"""ZeRO's checkpoints in jobs of real processes: going on at the same, another and one's own size; export; damage."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ONE, TWO, ask, perform, together, zero

from modules.export import load_editor
from trainers import export
from trainers.checkpoints.folder import CheckpointError, verify
from trainers.cli import TrainingCLI

pytestmark = pytest.mark.filterwarnings("ignore")
DDP = "--trainer.strategy=ddp_find_unused_parameters_true"
MOVED = ["2x2-2x3", "2x2-1x2", "2x3-1x3", "2x3-1x1", "1x2-2x2", "1x2-2x3"]
LORA = ["--model.init_args.train=lora"]
RATES = [
    "--model.init_args.optimizer.selection_lr=0.0005",  # two parameter groups that differ
    # the size of gradients shows: neither Adam's root takes it out, nor the clip
    "--model.init_args.optimizer.eps=0.01",
    "--trainer.gradient_clip_val=null",
]


def half(name: str, *args: str) -> dict[str, Any]:
    return {"name": name, "args": [*args, *RATES], "steps": 3, "save": True}


def rest(name: str, of: str, *args: str) -> dict[str, Any]:
    """The steps after `half`."""
    return {"name": name, "args": [*args, *RATES], "steps": 6, "resume": of}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, dict[str, Any]]:
    """Runs of six steps, and such as were saved after three and went on elsewhere: <from>-<to>, ranks x stage."""

    def saved(name: str) -> str:
        return str(folder / name / "checkpoints" / "step3.ckpt")

    first = [
        {"name": "whole", "args": [*TWO, *zero(2), *RATES], "steps": 6},
        {"name": "whole3", "args": [*TWO, *zero(3), *RATES], "steps": 6},
        half("2x2", *TWO, *zero(2)),
        half("2x3", *TWO, *zero(3)),
        half("2x3-lora", *TWO, *zero(3), *LORA),
        rest("2x2-2x2", saved("2x2"), *TWO, *zero(2)),
        rest("2x3-2x3", saved("2x3"), *TWO, *zero(3)),
        rest("2x2-2x3", saved("2x2"), *TWO, *zero(3)),
        half("2xddp", *TWO, DDP),
        {"name": "other", "args": [*TWO, *zero(2), *LORA], "steps": 6, "resume": saved("2x2"), "fails": True},
    ]
    then = [
        half("1x2", *ONE, *zero(2)),
        rest("2x2-1x2", saved("2x2"), *ONE, *zero(2)),
        rest("2x3-1x3", saved("2x3"), *ONE, *zero(3)),
        rest("2x3-1x1", saved("2x3"), *ONE, *zero(1)),
    ]
    last = [
        rest("1x2-2x2", saved("1x2"), *TWO, *zero(2)),
        rest("1x2-2x3", saved("1x2"), *TWO, *zero(3)),
    ]
    found = together(folder, first) | together(folder, then, ranks=1) | together(folder, last)
    alone = [half("one", *ONE), half("one-lora", *ONE, *LORA), rest("2xddp-one", saved("2xddp"), *ONE)]
    return found | {run["name"]: perform(run, folder) for run in alone}


@pytest.mark.parametrize(("resumed", "whole"), [("2x2-2x2", "whole"), ("2x3-2x3", "whole3")])
def test_at_the_same_size_the_run_goes_on_bit_by_bit(runs: dict[str, Any], resumed: str, whole: str) -> None:
    assert runs[resumed]["losses"] == runs[whole]["losses"][3:]
    assert all(torch.equal(t, runs[resumed]["params"][n]) for n, t in runs[whole]["params"].items())
    assert runs[resumed]["records"] == [rank[3:] for rank in runs[whole]["records"]]


@pytest.mark.parametrize("resumed", [*MOVED, "2xddp-one"])
def test_at_another_size_or_stage_it_goes_on_too(runs: dict[str, Any], resumed: str) -> None:
    """The same records, losses and parameters as if the job had never changed."""
    losses = runs[resumed]["losses"]
    if len(losses) == 6:  # one process takes two micro-batches for a step
        losses = [(a + b) / 2 for a, b in zip(losses[::2], losses[1::2], strict=True)]
    assert losses == pytest.approx(runs["whole"]["losses"][3:], rel=1e-5)
    for name, tensor in runs["whole"]["params"].items():
        torch.testing.assert_close(runs[resumed]["params"][name], tensor, rtol=1e-6, atol=1e-5)


def test_a_checkpoint_of_other_parameters_is_refused(runs: dict[str, Any]) -> None:
    error = runs["other"]["error"]
    assert error.startswith("CheckpointError")
    assert "lora_A" in error
    assert "config.yaml" in error


def test_frozen_parameters_are_not_saved(runs: dict[str, Any], folder: Path) -> None:
    """The adapters are a small part of the tiny model, and so is their checkpoint."""
    saved = folder / "2x3-lora" / "checkpoints" / "step3.ckpt"
    manifest = verify(saved)
    trained = set(runs["2x3-lora"]["params"])
    assert set(manifest["parameters"]) == trained
    count = sum(t.numel() for t in runs["2x3-lora"]["params"].values())
    # a 32-bit copy and two moments, and what describes them
    assert sum(f["bytes"] for f in manifest["files"].values()) < 4 * 3 * count + 400_000


@pytest.mark.parametrize(("run", "alone"), [("2x2", "one"), ("2x3", "one"), ("1x2", "one"), ("2x3-lora", "one-lora")])
def test_an_export_answers_as_the_run_did(runs: dict[str, Any], folder: Path, run: str, alone: str) -> None:
    """From shards, without the job's processes; and its weights are those that one process would have exported."""
    answers: list[list[torch.Tensor]] = []
    for name in (run, alone):
        out = folder / f"export-{run}-{name}"
        export.export(str(folder / name), str(out))
        config = folder / name / "config.yaml"
        cli = TrainingCLI([f"--config={config}", "--trainer.strategy=auto", "--trainer.devices=1"])
        answers.append(ask(load_editor(out), cli.datamodule))
    here, there = answers
    for before, after in zip(runs[run]["answers"], here, strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)
    for one, two in zip(there, here, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


def test_each_file_is_missed_by_name(runs: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    whole = folder / "2x3" / "checkpoints" / "step3.ckpt"
    names = [p.relative_to(whole).as_posix() for p in whole.rglob("*") if p.is_file()]
    assert len(names) == 6  # two files of each rank, the tag, the manifest
    for name in names:
        for harm in (delete, truncate, flip):
            damaged = tmp_path / harm.__name__ / "step3.ckpt"
            shutil.copytree(whole, damaged)
            harm(damaged / name)
            with pytest.raises(CheckpointError, match=name.split("/")[-1]):
                verify(damaged)
            shutil.rmtree(damaged.parent)


def delete(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    with file.open("rb+") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
