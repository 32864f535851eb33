"""Every file in configs/ parses into what it configures; no model is loaded."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from trainers import command
from trainers.cli import CONFIGS, TrainingCLI
from trainers.evaluate import evaluate

FILES = sorted(CONFIGS.glob("*.yaml"))  # those of training-free editors: tests/trainers/test_editors.py
EVALUATED = ("evaluate_", "benchmark_")
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def base_of(path: Path) -> list[str]:
    """A file that changes another one begins with the command that uses both: its --config arguments, in order."""
    first = [w for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#") for w in line.split()]
    named = [first[i + 1] for i, word in enumerate(first[:-1]) if word == "--config"]
    return named[: named.index(path.name)] if path.name in named else []


@pytest.mark.parametrize("path", [p for p in FILES if not p.name.startswith(EVALUATED)], ids=name)
def test_training_config(path: Path, tmp_path: Path) -> None:
    given = [f"--config={c}" for c in [*base_of(path), str(path)]]
    cli = TrainingCLI([*given, *HERE, f"--run_dir={tmp_path}"])
    assert cli.model.model is None  # type: ignore[union-attr]
    assert cli.datamodule.train
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith(EVALUATED)], ids=name)
def test_evaluation_config(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def stub(**values: Any) -> None:
        seen.update(values)

    stub.__signature__ = __import__("inspect").signature(evaluate)  # type: ignore[attr-defined]
    stub.__annotations__, stub.__doc__, stub.__name__ = evaluate.__annotations__, evaluate.__doc__, "evaluate"
    command.run(stub, [f"--config={path}"])
    assert seen["data"] or seen["benchmark"].datasets
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() <= seen.keys()
