"""MEND and IBKE from their tiny configs: golden curves, resumed runs, stopping early, the commands.

A change that is meant to move a curve: PALIMPSEST_UPDATE_GOLDEN=1 pytest tests/trainers/test_hypernetwork_run.py
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from modules.backbone import BackboneConfig
from modules.export import load_editor
from modules.trained.ibke import IBKE, IbkeLoss
from trainers import evaluate as evaluate_command
from trainers import export as export_command
from trainers.callbacks.save_checkpoints import write_scores
from trainers.checkpoints.single import tensors
from trainers.cli import TrainingCLI, parse
from trainers.command import run as command
from trainers.edit import edit

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = ["mend_tiny", "ibke_tiny"]
pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[list[str], dict[str, float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.seen.append((batch.records, losses))


def run(
    folder: Path, steps: int, checkpoint: str | None = None, *more: str, config: str = "mend_tiny"
) -> tuple[TrainingCLI, Watch]:
    quiet = [f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")]
    args = [f"--config={config}", f"--run_dir={folder}", f"--trainer.max_steps={steps}", *quiet, *more]
    cli = TrainingCLI([*args, "--trainer.num_sanity_val_steps=0"])
    watch = Watch()
    cli.trainer.callbacks.insert(0, watch)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
    return cli, watch


@pytest.mark.parametrize("config", CONFIGS)
def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, config: str) -> None:
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", "--checkpoint.monitor=null"]
    more += ["--checkpoint.mode=max", "--trainer.callbacks=[]"]
    whole, seen = run(tmp_path / "whole", 6, None, *more, config=config)
    _, before = run(tmp_path / "part", 3, None, *more, config=config)
    saved = tmp_path / "part" / "checkpoints" / "step3.ckpt"
    names = dict(tensors(saved)).keys()
    resumed, after = run(tmp_path / "part", 6, str(saved), *more, config=config)
    assert before.seen + after.seen == seen.seen
    assert len(seen.seen) == 12
    one, two = (dict(cli.model.state_dict()) for cli in (whole, resumed))
    assert one.keys() == two.keys() == names
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    moments = [[t for s in cli.trainer.optimizers[0].state.values() for t in s.values()] for cli in (whole, resumed)]
    assert all(torch.equal(a, b) for a, b in zip(*moments, strict=True))


@pytest.mark.parametrize("config", CONFIGS)
def test_golden_curve(tmp_path: Path, config: str) -> None:
    _, watch = run(tmp_path, 20, None, "--trainer.callbacks=[]", "--checkpoint.monitor=null", config=config)
    losses, file = [losses["train/loss"] for _, losses in watch.seen], GOLDEN / f"{config}.json"
    if os.environ.get("PALIMPSEST_UPDATE_GOLDEN"):
        file.write_text(json.dumps({"train/loss": losses}, indent=1) + "\n", encoding="utf-8")
    assert losses == pytest.approx(json.loads(file.read_text(encoding="utf-8"))["train/loss"], rel=1e-4)


@pytest.mark.parametrize("largest", [15, 16])
def test_micro_batches_of_one_pool_without_others_are_told(tmp_path: Path, largest: int) -> None:
    more = [f"--data.init_args.pool_sizes=[{largest}]", "--model.init_args.queries.locality_from=others"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, 1, None, *more, "--trainer.callbacks=[]", "--checkpoint.monitor=null")
    told = [str(w.message) for w in caught if "queries.locality_from others" in str(w.message)]
    assert len(told) == (largest == 16)
    assert all("pool_sizes up to 16, records_per_batch 16" in line for line in told)


def test_training_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    """With an improvement asked for that never comes: stopped after two validations more than the first."""
    stop = ["--trainer.val_check_interval=2", "--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=10"]
    cli, watch = run(tmp_path, 20, None, *stop, "--checkpoint.every_n_steps=2")
    assert len(watch.seen) == cli.trainer.global_step == 6
    scores = json.loads((tmp_path / "checkpoints" / "scores.json").read_text())
    best = cli.trainer.checkpoint_callback.best()  # type: ignore[union-attr]
    assert scores.keys() == {*best, "step6.ckpt"}
    assert scores[best[0]] == min(scores.values())
    assert scores["step6.ckpt"] == pytest.approx(float(cli.trainer.callback_metrics["val/loss"]))
    assert "val/reliability/token_accuracy" in cli.trainer.callback_metrics


@pytest.mark.parametrize(("config", "own"), [("mend_tiny", ()), ("ibke_tiny", ("BottleneckFigures",))])
def test_callbacks_that_edit_leave_training_as_it_is(tmp_path: Path, config: str, own: tuple[str, ...]) -> None:
    names = (*own, "GradNorm", "Throughput", "PoolSizes", "SampleEdits", "FinalEvaluation")
    more = ["--trainer.callbacks=[]", "--checkpoint.monitor=null"]
    more += [f"--trainer.callbacks+=trainers.callbacks.{name}" for name in names]
    more += ["--trainer.callbacks.pool_sizes=[4]", "--trainer.callbacks.records=4", "--trainer.val_check_interval=2"]
    _, plain = run(tmp_path / "plain", 4, config=config)
    cli, watched = run(tmp_path / "watched", 4, None, *more, config=config)
    assert [losses["train/loss"] for _, losses in watched.seen] == [losses["train/loss"] for _, losses in plain.seen]
    report = json.loads((tmp_path / "watched" / "evaluation.json").read_text())
    method = cli.model.method
    assert {method, f"{method} (untrained)", "unedited"} <= set(report["aggregate"])
    assert not report.get("failures")
    assert cli.trainer.callback_metrics["train/grad_norm"] > 0
    assert cli.trainer.callback_metrics["train/padding_share"] > 0


def test_from_training_to_edits_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "run", 2)
    command(export_command.export, [f"--run_dir={tmp_path}/run", f"--out={tmp_path}/editor"])
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "Lyon is in", "target": "Japan"}\n{"text": "Osaka is a city of Kenya."}\n')
    asked = [f"--editor={tmp_path}/editor", "--prompt", "Lyon is in"]
    capsys.readouterr()
    command(edit, [*asked, f"--edits={edits}", f"--save={tmp_path}/pool", f"--merge={tmp_path}/plain"])
    first = capsys.readouterr()
    assert "2 edits in the pool" in first.err
    command(edit, [*asked, f"--pool={tmp_path}/pool"])
    assert capsys.readouterr().out == first.out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    editor: Any = load_editor(tmp_path / "editor")
    loaded = editor.model.backbone.model
    differ = {n for n, p in merged.named_parameters() if not torch.equal(p, loaded.get_parameter(n))}
    assert differ == {f"{name}.weight" for name in editor.model.names}
    sources = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    small = ["--records=4", "--pool_sizes=[1, 4]", "--singles=2", "--queries_per_kind=1", "--exact_match=false"]
    out = tmp_path / "results.json"
    command(
        evaluate_command.evaluate,
        [f"--editor=[{tmp_path}/editor]", f"--data={sources}", f"--out={out}", "--baselines=[unedited]", *small],
    )
    report = json.loads(out.read_text())
    assert set(report["aggregate"]["mend"]) == {"1", "4"}
    assert not report.get("failures")


def test_an_export_is_of_the_best_checkpoint_and_has_no_other_ones_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path, 2, None, "--trainer.val_check_interval=1", "--checkpoint.top_k=2", "--data.init_args.val_records=5")
    write_scores(tmp_path / "checkpoints", {"step1.ckpt": 0.1, "step2.ckpt": 0.2})
    own, other = tmp_path / "evaluation.json", tmp_path / "other.json"
    taken: list[tuple[int, bool]] = []
    for i, (told, given) in enumerate(
        [
            ({"step": 2}, []),  # of step 1
            ({"step": 1}, []),
            ({"step": 1}, ["--checkpoint=last"]),  # a run that was resumed and stopped before its own evaluation
            ({"step": 2}, ["--checkpoint=last"]),
            ({}, ["--checkpoint=last"]),  # none of the trained editor yet
            ({}, ["--checkpoint=last", f"--metrics={other}"]),  # of trainers.evaluate
            ({"step": 1}, ["--checkpoint=last", f"--metrics={other}"]),
        ]
    ):
        file = other if given[1:] else own
        file.write_text(json.dumps({"meta": told, "aggregate": {"mend": {}}}))
        out = tmp_path / f"editor{i}"
        capsys.readouterr()
        command(export_command.export, [f"--run_dir={tmp_path}", f"--out={out}", *given])
        about = json.loads((out / "editor.json").read_text())
        taken.append((about["step"], about["metrics"] == {"mend": {}}))
        assert (f"{file} is left out of editor.json: it " in capsys.readouterr().out) != taken[-1][1]
    assert taken == [(1, False), (1, True), (2, False), (2, True), (2, False), (2, True), (2, False)]


def test_wrong_metrics_are_refused_before_a_checkpoint_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_command, "TrainingCLI", None)  # nothing may be built or read
    (tmp_path / "config.yaml").touch()
    file = tmp_path / "m.json"
    given = [f"--run_dir={tmp_path}", f"--out={tmp_path / 'out'}"]
    for text, message in (
        (None, "cannot be read: No such file"),
        ("{", "is no JSON"),
        ("[]", "holds no results"),
        ("{}", "holds no results"),
    ):
        if text is not None:
            file.write_text(text)
        with pytest.raises(SystemExit, match=rf"--metrics .*m\.json {message}"):
            command(export_command.export, [*given, f"--metrics={file}"])
    (tmp_path / "evaluation.json").write_text("[]")
    with pytest.raises(SystemExit, match=r"error: .*evaluation\.json holds no results"):
        command(export_command.export, given)


def test_precision_is_checked_before_anything_starts(tmp_path: Path) -> None:
    cli = parse(["--config=mend_tiny", f"--run_dir={tmp_path}", "--trainer.precision=bf16-true"])
    with pytest.raises(ValueError, match=r"trainer\.precision bf16-true"):
        cli.check()


def test_one_setting_leaves_the_others_as_published() -> None:
    """Also where the command line gives one key of a group, as in --model.init_args.loss.chunk 7."""
    given = ["--config=ibke_tiny", "--model.init_args.loss.chunk=7", "--model.init_args.layers.modules=[mlp.up_proj]"]
    model: Any = parse(given).model
    assert model.loss == IbkeLoss(1.0, 1.0, locality_on="answer", locality_direction="reverse", chunk=7)
    assert (model.layers.layers, model.layers.modules) == ([1, 2], ["mlp.up_proj"])
    assert IBKE(BackboneConfig("random:llama")).layers.layers == [6, 7, 8]
