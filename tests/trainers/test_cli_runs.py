"""A run from the command line: its export, what comes next, and what ends it."""

import io
import pickle
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from command_ends import TINY, ends, save

from trainers import command, evaluate, export, fit
from trainers.callbacks.preemption import checkpoints
from trainers.callbacks.save_checkpoints import SaveCheckpoints, write_scores
from trainers.checkpoints.single import STATE, FolderIO
from trainers.cli import TrainingCLI
from trainers.next_steps import next_steps


def test_fit_export_and_what_is_refused_between(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with redirect_stdout(said):
        fit.main([*quick, "--ckpt_path=last"])
    assert said.getvalue().count("starting from the beginning") == 1
    run = tmp_path / "run"
    assert {"config.yaml", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step2.ckpt"]

    message, code = ends(fit.main, quick)
    assert code not in (0, None)
    assert "--ckpt_path last" in message
    message, code = ends(fit.main, [*quick, "--ckpt_path=nowhere.ckpt"])
    assert code not in (0, None)
    assert "nowhere.ckpt" in message

    where, look, *commands = said.getvalue().splitlines()[-4:]  # which can be pasted
    assert where == f"the run is in {run}, its newest checkpoint is {run / 'checkpoints' / 'step2.ckpt'}"
    assert look.split() == ["look", "at", "it:", "tensorboard", "--logdir", str(run)]
    (_, _, *to_export), (_, _, *to_evaluate) = map(shlex.split, commands)
    assert to_export[:3] == ["python", "-m", "trainers.export"]
    assert to_evaluate[:3] == ["python", "-m", "trainers.evaluate"]
    command.run(export.export, to_export[3:])
    out = tmp_path / "exported" / "run"
    assert (out / "editor.json").is_file()
    command.run(evaluate.evaluate, [*to_evaluate[3:], "--records=2", "--exact_match=false", "--baselines=[]"])
    assert (run / "results.json").is_file()
    message, code = ends(command.run, export.export, ["--run_dir", str(run), "--out", str(out)])
    assert code not in (0, None)
    assert "is not empty" in message

    marker = tmp_path / "ran"
    evil = tmp_path / "evil.ckpt"
    FolderIO().save_checkpoint({"state_dict": {}, "global_step": 0, "evil": _Evil(str(marker))}, evil)
    with pytest.raises((pickle.UnpicklingError, SystemExit)):
        command.run(export.export, ["--run_dir", str(run), "--out", str(tmp_path / "o2"), "--checkpoint", str(evil)])
    message, code = ends(fit.main, [*quick, f"--run_dir={tmp_path / 'other'}", f"--ckpt_path={evil}"])
    assert code not in (0, None)
    assert str(evil / STATE) in message
    assert not marker.exists()
    assert not (tmp_path / "o2").exists()


class _Evil:
    """Code that would run when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_what_comes_after_a_run_is_of_the_best_checkpoint_and_in_the_editors_own_mode(tmp_path: Path) -> None:
    cli = TrainingCLI(["--config", "mend_tiny", f"--run_dir={tmp_path}", "--checkpoint.monitor=val/loss"])
    folder = tmp_path / "checkpoints"
    best, newest = save(folder, 1), save(folder, 2)
    checkpoints(cli.trainer).scores = {best.name: 0.1, newest.name: 0.9}
    where, _, to_export, to_evaluate = next_steps(cli).splitlines()
    assert where.endswith(f"{newest}, the best by val/loss is {best}")
    assert "--checkpoint" not in to_export  # the best is taken
    assert to_evaluate.endswith(f" --out {tmp_path / 'results.json'} --mode single")


def test_what_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    best, good, newest = (save(tmp_path, step) for step in (1, 2, 3))
    saves = SaveCheckpoints(str(tmp_path), monitor="val/loss", mode="min", top_k=2)

    def taken(checkpoint: str, saves: SaveCheckpoints = saves) -> tuple[Path, str]:
        return export.chosen(tmp_path, checkpoint, saves), capsys.readouterr().out

    assert taken("best") == (newest, "no checkpoint here has a score by val/loss\ntaking step3.ckpt, the newest\n")
    write_scores(tmp_path, {best.name: 0.1, good.name: 0.2})
    assert taken("best") == (best, "taking step1.ckpt, the best by val/loss (0.1)\n")
    assert taken("best", SaveCheckpoints(str(tmp_path), monitor="val/loss", mode="max"))[0] == good
    assert taken("best", SaveCheckpoints(str(tmp_path))) == (newest, "taking step3.ckpt, the newest\n")
    assert taken("last") == (newest, "taking step3.ckpt, the newest\n")
    assert taken(str(good)) == (good, "")
    (best / STATE).unlink()
    path, said = taken("best")
    assert path == good
    assert said.startswith(f"{best}, whose val/loss is better, is missing or damaged; passing over it\n")


def test_fast_dev_run(quick: list[str], tmp_path: Path) -> None:
    fit.main([*quick, "--trainer.fast_dev_run=true"])
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("when", ["--trainer.val_check_interval=1", "--trainer.num_sanity_val_steps=1"])
def test_a_checkpoint_error_in_training_is_one_line(quick: list[str], when: str) -> None:
    """At the first validation, and where there is a sanity check in that: two steps are not validated otherwise."""
    message, code = ends(fit.main, [*quick, when, "--checkpoint.monitor=val/relyability"])
    assert isinstance(code, str)
    assert code.startswith("error: checkpoint.monitor is 'val/relyability'")
    assert "val/reliability/token_accuracy" in code
    assert "Traceback" not in message


def test_a_missing_file_of_records_is_named_before_anything_is_built(quick: list[str], tmp_path: Path) -> None:
    sources = f"[{{format: counterfact, path: {tmp_path / 'nowhere.json'}}}]"
    message, code = ends(fit.main, [*quick, f"--data.init_args.val={sources}"])
    assert code.startswith("error: no file")
    assert "nowhere.json" in code
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_malformed_record_is_one_line(quick: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('[{"case_id": 0, "prompt": "A city is in"}]', encoding="utf-8")
    sources = f"[{{format: counterfact, path: {file}, options: {{}}}}]"
    message, code = ends(fit.main, [*quick, f"--data.init_args.train={sources}"])
    assert code.startswith(f"error: {file}, record")
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.init_args.train=[{format: facts, limit: 3}]"], "3 records do not fill one optimizer step of 16"),
        (["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"], "Trainer(limit_train_batches=3)"),
        (["--model.init_args.backbone.source=random:bert"], "backbone 'random:bert': choose a type among"),
    ],
)
def test_what_training_refuses_is_one_line(quick: list[str], options: list[str], said: str) -> None:
    _, code = ends(fit.main, [*quick, *options])
    assert code.startswith(f"error: {said}")
    assert "\n" not in code


def test_a_fault_keeps_its_traceback(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        return int("none")

    monkeypatch.setattr("modules.trained.InComeS.training_step", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        fit.main(quick)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_errors_are_said_by_rank_0_alone(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoints", 1)
    wrong = [["--model.init_args.loss.kl_wieght=1"], ["--data.init_args.records_per_batch=0"], []]
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        for options in wrong:
            message, code = ends(fit.main, [*TINY, f"--run_dir={tmp_path}", *options])
            assert code not in (0, None)
            assert bool(message) == (rank == "0")
            assert rank == "0" or code == 1
