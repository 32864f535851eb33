"""DistillMIKE as a run: the same update however a job is spread, resuming, and from training to edits."""

import json
import os
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import PeftModel
from ranks import CONFIGS, ONE, TWO, perform, together, zero
from transformers import AutoModelForCausalLM

from datamodules.tokens import encode
from modules.backbone import load_backbone
from modules.distill import store
from modules.distill.queries import questions_of
from modules.export import load_editor
from modules.trained.distillmike import DistillMIKE
from trainers import evaluate as evaluate_command
from trainers import export as export_command
from trainers.checkpoints.single import tensors
from trainers.cli import CONFIGS as CONFIG_FOLDER
from trainers.cli import TrainingCLI
from trainers.command import run as command
from trainers.edit import edit
from trainers.estimate import named
from trainers.estimate.command import parsed
from trainers.estimate.measure import count
from trainers.estimate.plan import Plan, plan_of
from trainers.estimate.totals import STEP, estimate_plan

GOLDEN = Path(__file__).parents[1] / "golden" / "distillmike_tiny.json"
STEPS = 6
# where an element's gradients are no larger than Adam's usual 1e-8, the rounding of their sums decides its step
EPS = "--model.init_args.optimizer.eps=1e-6"
SPREADS: dict[str, list[str]] = {
    "ddp": [*TWO, "--trainer.strategy=ddp"],
    "zero2": [*TWO, *zero(2)],
    "zero2-top": [*TWO, *zero(2), "--model.init_args.teaching.top_k=8"],
    "zero3": [*TWO, *zero(3), "--trainer.val_check_interval=3", "--model.init_args.gradient_checkpointing=true"],
}
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")

    def task(name: str, args: list[str], taught: str) -> dict[str, Any]:
        kept = f"--model.init_args.teaching.folder={folder / taught}"
        return {"name": name, "args": [*args, EPS, kept], "steps": STEPS, "config": "distillmike_tiny"}

    found = together(folder, [task(name, args, "by_two") for name, args in SPREADS.items()])
    alone = [task("one", ONE, "by_one"), task("one-top", [*ONE, "--model.init_args.teaching.top_k=8"], "by_one")]
    return found | {run["name"]: perform(run, folder) for run in alone} | {"folder": {"path": folder}}


@pytest.mark.parametrize("spread", list(SPREADS))
def test_losses_and_parameters_are_those_of_one_process(runs: dict[str, Any], spread: str) -> None:
    one, two = runs["one-top" if spread.endswith("top") else "one"], runs[spread]
    halves = one["losses"]
    assert len(two["losses"]) == STEPS
    expected = [(a + b) / 2 for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert two["losses"] == pytest.approx(expected, rel=1e-5)
    assert two["params"].keys() == one["params"].keys()
    assert all("lora_" in name for name in one["params"])
    for name, tensor in one["params"].items():
        torch.testing.assert_close(two["params"][name], tensor, rtol=1e-6, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_moved_what_it_trains(runs: dict[str, Any]) -> None:
    """The comparison above would hold for runs that do nothing."""
    assert all(t.abs().max() > 1e-3 for n, t in runs["one"]["params"].items() if "lora_B" in n)  # zero at first
    assert runs["one"]["losses"] != runs["one-top"]["losses"]


def test_ranks_share_out_the_teacher(runs: dict[str, Any]) -> None:
    """Two ranks leave the files that one process makes, each with the same answers."""
    by_one, by_two = ({f.name for f in (runs["folder"]["path"] / w).glob("taught-*")} for w in ("by_one", "by_two"))
    assert by_one == by_two
    assert len(by_one) == 4  # two of all edits, kept whole and in part
    for name in by_one:
        one, two = (store._read(runs["folder"]["path"] / w / name) for w in ("by_one", "by_two"))
        assert one[1] == two[1]
        assert all(torch.equal(t, two[0][n]) for n, t in one[0].items())


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[list[str], dict[str, float]]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, index: int) -> None:
        losses = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.seen.append((batch.records, losses))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def cli(folder: Path, steps: int, *more: str) -> TrainingCLI:
    quiet = [f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")]
    given = [*CONFIGS["distillmike_tiny"][:2], "--trainer.num_sanity_val_steps=0", f"--trainer.max_steps={steps}"]
    return TrainingCLI(["--config=distillmike_tiny", f"--run_dir={folder}", *quiet, *given, *more])


def run(folder: Path, steps: int, checkpoint: str | None = None, *more: str) -> tuple[TrainingCLI, Watch]:
    built, watch = cli(folder, steps, *more), Watch()
    built.trainer.callbacks.insert(0, watch)
    built.trainer.fit(built.model, built.datamodule, ckpt_path=checkpoint)
    return built, watch


def test_golden_curve(tmp_path: Path) -> None:
    built, watch = run(tmp_path, 20)
    losses = [losses["train/loss"] for _, losses in watch.seen]
    if os.environ.get("PALIMPSEST_UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"train/loss": losses}, indent=1) + "\n", encoding="utf-8")
    assert losses == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8"))["train/loss"], rel=1e-4)
    assert losses[-1] < losses[0] / 2
    assert "val/reliability/token_accuracy" in built.trainer.callback_metrics


def test_resumed_run_is_the_uninterrupted_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the start is another one now: a checkpoint holds its own."""
    whole, seen = run(tmp_path / "whole", 6)
    _, before = run(tmp_path / "part", 3)
    saved = tmp_path / "part" / "checkpoints" / "step3.ckpt"
    assert all("lora_" in name for name in dict(tensors(saved)))
    monkeypatch.setattr("modules.trained.distillmike.read", lambda *_: {})
    resumed, after = run(tmp_path / "part", 6, str(saved))
    assert before.seen + after.seen == seen.seen
    one, two = ({n: p for n, p in c.model.named_parameters() if p.requires_grad} for c in (whole, resumed))
    assert all(torch.equal(p, two[n]) for n, p in one.items())
    fewer = '[{"format": "facts", "options": {"split": "train"}, "limit": 31}]'
    with pytest.raises(ValueError, match=r"the checkpoint is of 32 edits, and data\.train has 31, 31 of them the same"):
        run(
            tmp_path / "other",
            6,
            str(saved.with_name("step6.ckpt")),
            *(f"--data.init_args.{of}={fewer}" for of in ("train", "val")),
        )


def test_validation_is_of_what_is_distilled(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.val: 16 of 16 edits are not among the 32 distilled.*data\.train"):
        run(tmp_path, 1, None, '--data.init_args.val=[{"format": "facts", "options": {"split": "val"}, "limit": 50}]')


def test_validation_leaves_out_what_training_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = cli(tmp_path / "lengths", 1, "--data.init_args.val_records=32")
    records, tokenizer, queries = built.datamodule.validation_records(), built.model.tokenizer, built.model.queries
    lengths = sorted(
        max(len(encode(tokenizer, q.prompt, q.target).ids) for q in questions_of(r, queries)) for r in records
    )
    assert lengths[3] < lengths[-1]
    with caplog.at_level("INFO"):
        short, _ = run(tmp_path, 1, None, f"--model.init_args.queries.max_query_tokens={lengths[-1] - 1}")
    train, val = (re.search(rf"left out (\d+) of 32 records .*\({of}\)", caplog.text) for of in ("train", "val"))
    assert train is not None
    assert val is not None
    assert int(train[1]) == int(val[1]) == 32 - len(short.model.requests) > 0
    assert caplog.text.count("(val)") == 1
    kept = short.datamodule.validation_records()
    assert all(short.model.collator().fits(r) for r in kept)
    assert len(kept) == 16


def test_wrong_settings_are_named_before_the_teacher_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistillMIKE, "_taught", lambda *_: pytest.fail("asked"))
    with pytest.raises(ValueError, match=r"model\.adapters\.targets \['query'\]"):
        run(tmp_path / "targets", 1, None, '--model.init_args.adapters.targets=["query"]')
    (tmp_path / "deltas.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"model\.start: .*cannot be read"):
        run(tmp_path / "start", 1, None, f"--model.init_args.start={tmp_path}")


def test_a_teacher_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.teacher: unedited puts nothing before prompts"):
        run(tmp_path, 1, None, "--model.init_args.teacher=modules.training_free.icl.Unedited")


def test_from_training_to_edits_by_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    run(tmp_path / "run", 2)
    editor = tmp_path / "editor"
    command(export_command.export, [f"--run_dir={tmp_path}/run", f"--out={editor}"])
    prompt = json.loads((editor / "edits.json").read_text())[0]["prompt"]
    capsys.readouterr()
    asked = [f"--editor={editor}", f"--edits={editor}/edits.json", "--prompt", prompt, f"--merge={tmp_path}/plain"]
    command(edit, asked)
    assert "32 edits in the pool" in capsys.readouterr().err

    # three ways to the same model: merged, as an adapter, and as an editor
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    loaded: Any = load_editor(editor)
    adapted = PeftModel.from_pretrained(load_backbone(loaded.backbone.config).model, editor)
    ids = torch.tensor([loaded.backbone.tokenizer(prompt).input_ids])
    with torch.no_grad(), loaded.edit(loaded.reader, loaded.distilled) as edited:
        expected = loaded.backbone.logits(edited.decode(ids, torch.ones_like(ids))[0].last_hidden_state)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(adapted(ids).logits, expected, atol=1e-5, rtol=1e-5)

    sources = '[{"format": "facts", "options": {"split": "train"}, "limit": 32}]'
    small = ["--records=6", "--pool_sizes=[3]", "--queries_per_kind=1", "--exact_match=false", "--baselines=[unedited]"]
    out = tmp_path / "results.json"
    command(evaluate_command.evaluate, [f"--editor=[{editor}]", f"--data={sources}", f"--out={out}", *small])
    report = json.loads(out.read_text())
    assert set(report["aggregate"]) == {"unedited", "distillmike"}
    assert not report.get("failures")


def test_zero_checkpoints_hold_edits_and_start(runs: dict[str, Any], tmp_path: Path) -> None:
    """An export needs no more than the checkpoint, whoever wrote it."""
    folder = runs["folder"]["path"]
    kept = f"--model.init_args.teaching.folder={folder / 'by_two'}"
    args = [*TWO, *zero(2), EPS, kept]
    saved = {"name": "saved", "args": args, "steps": 1, "config": "distillmike_tiny"} | {"checkpoint": True}
    together(tmp_path, [saved | {"args": [*args, "--checkpoint.at_end=true"]}])
    path = next((tmp_path / "saved" / "checkpoints").glob("step1.ckpt"))
    found = export_command.besides(path, "zero")["distilled"]
    assert len(found["requests"]) == 32
    module: Any = cli(tmp_path / "export", 1).model
    export_command.fill(module, path, "zero")
    assert len(module.requests) == 32
    assert module.student.start.keys() == found["start"].keys()
    assert module.student.start


def planned(*more: str, gpus: int = 1, card: str = "cpu") -> Plan:
    return plan_of(parsed(["--config=distillmike_tiny", *more]), gpus, named(card))


def test_dry_run_counts_by_hand() -> None:
    d, f, kv, r = 64, 128, 32, 8
    found = count(planned())
    assert found.parts["adapters"].all == found.trained == 4 * (r * (d + d) + r * (d + kv))
    assert sum(found.sizes) - found.trained == 2 * 257 * d + 4 * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d
    assert found.frozen == 0  # the teacher is the same model


def test_dry_run_takes_the_longest_batch() -> None:
    whole, part = (estimate_plan(planned(*more)) for more in ([], ["--model.init_args.queries.per_record=1"]))
    assert whole.tokens == 16 * 10 * 256
    assert part.tokens == 16 * 256
    assert part.total < whole.total
    top = estimate_plan(planned("--model.init_args.teaching.top_k=5"))
    assert top.total == pytest.approx(whole.total, rel=0.2)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("distillmike_*.yaml")), ids=lambda p: p.name)
def test_dry_run_of_shipped_configs(path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    args = [
        "--model.init_args.backbone.source=random:llama",
        f"--model.init_args.backbone.overrides={json.dumps(shape)}",
    ]
    found = estimate_plan(
        plan_of(parsed([f"--config={path}", *args, "--model.init_args.adapters.targets=[q_proj]"]), 8, named("h100"))
    )
    assert found.fits
    assert {"weights", "optimizer", "activations"} <= found.moments[STEP].keys()
