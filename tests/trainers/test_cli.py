"""The commands as a user types them: bare names, layers, what is refused, and what is said."""

import io
import pickle
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainers import command, export, fit
from trainers.cli import find_config, parse

TINY = ["--config", "incomes_tiny"]


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """A run of two steps on few records."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", *quiet]


def ends(function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """What a program says as it ends with an error, and its exit code."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, redirect_stderr(said), redirect_stdout(said):
        function(*args)
    message = f"{said.getvalue()}{end.value.code if isinstance(end.value.code, str) else ''}"
    return message, end.value.code


def test_bare_names_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("incomes_tiny", "incomes_tiny.yaml"):
        assert Path(find_config(given)).name == "incomes_tiny.yaml"
    (tmp_path / "incomes_tiny.yaml").write_text("a: 1")
    assert Path(find_config("incomes_tiny.yaml")) == Path("incomes_tiny.yaml")  # a file at hand goes first
    message, code = ends(parse, ["--config", "incomes_tinny"])
    assert code not in (0, None)
    assert "incomes_tinny" in message
    assert "incomes_smollm2.yaml" in message


def test_configs_are_layered(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("model: {init_args: {optimizer: {lr: 0.5}}}\n", encoding="utf-8")
    cli = parse([*TINY, f"--config={over}", "--model.init_args.optimizer.warmup_steps=7"])
    config = cli.model.optimizer_config  # type: ignore[union-attr]
    assert (config.lr, config.warmup_steps) == (0.5, 7)
    assert cli.model.gist_config.selection == "hidden"  # type: ignore[union-attr]


def test_printed_config_is_the_same_config(tmp_path: Path) -> None:
    printed, code = ends(parse, [*TINY, "--print_config"])
    assert code in (0, None)
    file = tmp_path / "printed.yaml"
    file.write_text(printed, encoding="utf-8")
    again, _ = ends(parse, ["--config", str(file), "--print_config"])
    assert yaml.safe_load(again) == yaml.safe_load(printed)


@pytest.mark.parametrize(
    ("argument", "named"),
    [
        ("--model.init_args.loss.kl_wieght=1", "kl_wieght"),
        ("--model.init_args.optimizer.lr=-1", "lr"),
        ("--model.init_args.train=everything", "train"),
        ("--model.class_path=modules.trained.NoSuchEditor", "NoSuchEditor"),
        ("--model.init_args.gist.match_layer=2", "match_layer"),
        ("--data.init_args.records_per_batch=0", "records_per_batch"),
        ("--trainer.max_stepz=3", "max_stepz"),
    ],
)
def test_what_is_wrong_is_named(argument: str, named: str) -> None:
    message, code = ends(parse, [*TINY, argument])
    assert code not in (0, None)
    assert named in message
    assert "Traceback" not in message


def test_fit_export_and_what_is_refused_between(quick: list[str], tmp_path: Path) -> None:
    said = io.StringIO()
    with redirect_stdout(said):
        fit.main([*quick, "--ckpt_path=last"])
    assert said.getvalue().count("starting from the beginning") == 1
    run = tmp_path / "run"
    assert {"config.yaml", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert (run / "checkpoints" / "last.ckpt").is_file()

    message, code = ends(fit.main, quick)
    assert code not in (0, None)
    assert "--ckpt_path last" in message
    message, code = ends(fit.main, [*quick, "--ckpt_path=nowhere.ckpt"])
    assert code not in (0, None)
    assert "nowhere.ckpt" in message

    out = tmp_path / "out"
    command.run(export.export, ["--run_dir", str(run), "--out", str(out)])
    assert (out / "editor.json").is_file()
    message, code = ends(command.run, export.export, ["--run_dir", str(run), "--out", str(out)])
    assert code not in (0, None)
    assert "is not empty" in message

    marker = tmp_path / "ran"
    evil = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "global_step": 0, "evil": _Evil(str(marker))}, evil)
    with pytest.raises((pickle.UnpicklingError, SystemExit)):
        command.run(export.export, ["--run_dir", str(run), "--out", str(tmp_path / "o2"), "--checkpoint", str(evil)])
    assert not marker.exists()
    assert not (tmp_path / "o2").exists()


class _Evil:
    """Code that would run when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_fast_dev_run(quick: list[str]) -> None:
    fit.main([*quick, "--trainer.fast_dev_run=true"])
