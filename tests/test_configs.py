"""Every file in configs/ parses into what it configures; no model is loaded."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from trainers import command
from trainers.ability import ability, task
from trainers.cli import CONFIGS, TrainingCLI
from trainers.editors import BASELINES, TrainingFree, known_names, read
from trainers.evaluate import evaluate
from trainers.speed import speed

FILES = sorted(CONFIGS.glob("*.yaml"))  # those of training-free editors: tests/trainers/test_editors.py
EVALUATED = ("evaluate_", "benchmark_")
MEASURED = ("ability_", "costs_")
HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]


def name(path: Path) -> str:
    return path.relative_to(CONFIGS).as_posix()


def base_of(path: Path) -> list[str]:
    """A file that changes another one begins with the command that uses both: its --config arguments, in order."""
    first = [w for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#") for w in line.split()]
    named = [first[i + 1] for i, word in enumerate(first[:-1]) if word == "--config"]
    return named[: named.index(path.name)] if path.name in named else []


@pytest.mark.parametrize("path", [p for p in FILES if not p.name.startswith((*EVALUATED, *MEASURED))], ids=name)
def test_training_config(path: Path, tmp_path: Path) -> None:
    given = [f"--config={c}" for c in [*base_of(path), str(path)]]
    cli = TrainingCLI([*given, *HERE, f"--run_dir={tmp_path}"])
    assert cli.model.model is None  # type: ignore[union-attr]
    assert cli.datamodule.train
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("config", ["llama1b", "llama1b_hidden", "qwen7b", "qwen7b_hidden", "qwen3_8b"])
def test_the_papers_mixture_asks_portability_of_wiki_counterfact(config: str) -> None:
    """2,216 portability questions on 1,427 edits; in the released code each is a pair, as each edit is."""
    args = yaml.safe_load((CONFIGS / f"incomes_{config}.yaml").read_text(encoding="utf-8"))
    sources = [s["path"] for s in args["data"]["init_args"]["train"]]
    rates = args["model"]["init_args"]["queries"]["rates"]
    assert "knowedit/wiki_counterfact/train_cf.json.gz" in sources
    assert rates["portability"] / rates["request"] == pytest.approx(2216 / 1427, rel=0.05)


def parsed(function: Callable[..., None], path: Path) -> dict[str, Any]:
    """What a command would be called with."""
    seen: dict[str, Any] = {}

    def stub(**values: Any) -> None:
        seen.update(values)

    stub.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    stub.__annotations__, stub.__doc__, stub.__name__ = function.__annotations__, function.__doc__, function.__name__
    command.run(stub, [f"--config={path}"])
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() <= seen.keys()
    return seen


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith(EVALUATED)], ids=name)
def test_evaluation_config(path: Path) -> None:
    seen = parsed(evaluate, path)
    assert seen["data"] or seen["benchmark"].datasets


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("ability_")], ids=name)
def test_ability_config(path: Path) -> None:
    seen = parsed(ability, path)
    assert seen["data"]
    assert [task(spec).name for spec in seen["tasks"]] == seen["tasks"]


@pytest.mark.parametrize("path", [p for p in FILES if p.name.startswith("costs_")], ids=name)
def test_cost_config(path: Path) -> None:
    """Every editor that needs no training, but MeLLo and those that are there to compare with."""
    seen = parsed(speed, path)
    assert seen["data"]
    known = {one.name for one in read(seen["editor"]) if isinstance(one, TrainingFree)}
    assert known == set(known_names()) - {"mello", *BASELINES}


def test_every_config_is_in_the_index() -> None:
    index = (CONFIGS / "README.md").read_text(encoding="utf-8")
    assert not [path.stem for path in FILES if f"`{path.stem}`" not in index and f"`{path.name}`" not in index]
