"""The whole way of a user: fit, export, edit, evaluate, by the commands' own entry points."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from modules.backbone import BackboneConfig, load_backbone
from modules.gist.editor import GistEdited
from modules.uniedit import UNIEDIT_PROTOCOLS
from trainers import edit as edit_command
from trainers import evaluate as evaluate_command
from trainers import export as export_command
from trainers import fit as fit_command
from trainers.command import run
from trainers.edit import edit

EDITS = [{"prompt": "Lyon is in", "target": "Japan", "subject": "Lyon"}, {"text": "Osaka is a city of Kenya."}]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of two steps, exported."""
    folder = tmp_path_factory.mktemp("run")
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    fit_command.main(["--config=incomes_tiny.yaml", f"--run_dir={folder}/run", *quiet])
    run(export_command.export, [f"--run_dir={folder}/run", f"--out={folder}/editor"])
    return folder / "editor"


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "edits.jsonl"
    path.write_text("\n".join(map(json.dumps, EDITS)), encoding="utf-8")
    return path


def test_an_export_tells_where_it_comes_from(exported: Path) -> None:
    facts = json.loads((exported / "editor.json").read_text())
    assert facts["step"] == 2
    assert facts["backbone"]["source"] == "random:llama"
    assert facts["data"]["class_path"].endswith("EditDataModule")
    assert {"torch", "transformers", "palimpsest"} <= set(facts["versions"])


def test_no_teacher_is_copied_to_export(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deepcopy(model: object) -> object:
        raise AssertionError("a second model was made, which nobody asks")

    monkeypatch.setattr("modules.trained.incomes.copy", SimpleNamespace(deepcopy=deepcopy))
    run(export_command.export, [f"--run_dir={exported.parent}/run", f"--out={tmp_path}/again"])
    again, before = tmp_path / "again" / "editor.safetensors", exported / "editor.safetensors"
    assert again.read_bytes() == before.read_bytes()


def test_edit_shows_before_and_after(exported: Path, edits: Path, capsys: pytest.CaptureFixture) -> None:
    run(edit, [f"--editor={exported}", f"--edits={edits}", "--prompt", "Lyon is in", "--prompt=Osaka is"])
    shown = capsys.readouterr()
    assert "2 edits in the pool" in shown.err
    lines = shown.out.splitlines()
    assert [lines[0], lines[3]] == ["Lyon is in", "Osaka is"]
    assert all(lines[i].strip().startswith(name) for i, name in ((1, "before:"), (2, "after:"), (4, "before:")))


def test_edit_reads_prompts_from_standard_input_and_keeps_a_pool(
    exported: Path, edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lyon is in\n\nOsaka is\n"))
    run(edit, [f"--editor={exported}", f"--edits={edits}", f"--save={tmp_path / 'pool'}", "--compare=false"])
    first = capsys.readouterr().out
    assert first.splitlines()[::2] == ["Lyon is in", "Osaka is"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Lyon is in\nOsaka is\n"))
    run(edit, [f"--editor={exported}", f"--pool={tmp_path / 'pool'}", "--compare=false"])
    assert capsys.readouterr().out == first
    gone = tmp_path / "gone.txt"
    gone.write_text("Osaka is a city of Kenya.\n", encoding="utf-8")
    run(edit, [f"--editor={exported}", f"--pool={tmp_path / 'pool'}", f"--remove={gone}", "--prompt", '["Lyon is in"]'])
    assert "1 edits in the pool" in capsys.readouterr().err


def test_an_edit_that_cannot_be_removed_is_named_before_others_are_made(
    exported: Path, edits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be lost."""
    gone = tmp_path / "gone.txt"
    gone.write_text("Osaka is a city of Keny.\n", encoding="utf-8")
    monkeypatch.setattr(GistEdited, "edit", lambda *_: pytest.fail("edited"))
    with pytest.raises(SystemExit, match=r"cannot be removed: 'Osaka is a city of Keny\.'"):
        run(edit, [f"--editor={exported}", f"--edits={edits}", f"--remove={gone}"])


NUDGE = {"class_path": "deltas.Nudge", "init_args": {"layers": [1]}}
SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TINY = json.dumps({"source": "random:llama", "overrides": SHAPE})


def test_edit_with_a_training_free_editor(edits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nudge, first, later = tmp_path / "nudge.yaml", tmp_path / "first.jsonl", tmp_path / "later.jsonl"
    nudge.write_text(json.dumps(NUDGE))
    lines = edits.read_text().splitlines()
    first.write_text(lines[0])
    later.write_text(lines[1])
    given = [f"--editor={nudge}", f"--backbone={TINY}", "--prompt", "Lyon is in"]
    run(edit, [*given, f"--edits={first}", f"--save={tmp_path / 'pool'}"])
    shown = capsys.readouterr()
    assert "1 edits in the pool" in shown.err
    before, after = (line.split(":", 1)[1] for line in shown.out.splitlines()[1:3])
    assert before != after
    run(edit, [*given, f"--pool={tmp_path / 'pool'}"])
    assert capsys.readouterr().out == shown.out
    run(edit, [*given, f"--pool={tmp_path / 'pool'}", f"--edits={later}", f"--merge={tmp_path / 'plain'}"])
    assert "2 edits in the pool" in capsys.readouterr().err
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    loaded = load_backbone(BackboneConfig("random:llama", overrides=SHAPE)).model
    differ = {n for n, p in merged.named_parameters() if not torch.equal(p, loaded.get_parameter(n))}
    assert differ == {"model.layers.1.mlp.down_proj.weight"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--save=x"], "--save: not with icl: it has nothing to save"),
        (["--merge=x"], "--merge: not with icl: its edits are no change of weights"),
        (["--pool=."], "--pool: not with icl: it cannot go on from saved edits"),
        (["--remove={edits}"], "--remove: not with icl: it cannot take single edits out"),
    ],
)
def test_edit_says_what_a_method_cannot_do(edits: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(edit, ["--editor=icl", f"--backbone={TINY}", f"--edits={edits}", *(m.format(edits=edits) for m in more)])


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def refuse(*_: object) -> None:
        raise AssertionError("a model is loaded")

    for command in (edit_command, evaluate_command):
        monkeypatch.setattr(command, "build", refuse)


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--merge={used}"], "--merge: .*used is not empty; choose another folder"),
        (["--save={used}/file"], "--save .*file cannot be made: .*file is a file; give another folder"),
        (["--merge={used}/file/in"], "--merge .*in cannot be made: .*file is a file"),
        (["--save={used}/new", "--merge={used}/../used/new"], "a pool and a plain model need a folder each"),
        (["--pool={used}/nowhere"], "--pool: there is no folder .*nowhere"),
        (["--merge={used}/new", "--save={used}"], None),  # what was saved may be saved over
    ],
)
def test_edit_refuses_folders_before_a_model_is_loaded(
    edits: Path, tmp_path: Path, more: list[str], message: str | None
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    given = ["--editor=ft_m", f"--backbone={TINY}", f"--edits={edits}", *(m.format(used=used) for m in more)]
    with pytest.raises(SystemExit if message else AssertionError, match=message or "a model is loaded"):
        run(edit, given)
    assert [path.name for path in used.iterdir()] == ["file"]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--records=0"], "--records must be at least 1, got 0"),
        (["--pool_sizes=4,0"], "--pool_sizes must be at least 1, got 0"),
        (["--batch=0"], "--batch must be at least 1, got 0"),
        (["--singles=-1"], "--singles must be at least 1, got -1"),
        (["--batch_size=0"], "--batch_size must be at least 1, got 0"),
        (["--queries_per_kind=0"], "--queries_per_kind must be at least 1, or null to ask all queries; got 0"),
        (["--queries_per_kind=-1"], "--queries_per_kind must be at least 1, or null to ask all queries; got -1"),
        (
            ["--mode=single", "--pool_sizes=2"],
            r"--pool_sizes \[2\] has no effect: .* --mode batch, and the mode is single",
        ),
        (["--mode=sequential", "--pool_sizes=2,4"], r"--pool_sizes \[2,4\] has no effect: .* the mode is sequential"),
        (["--batch=3", "--pool_sizes=2"], r"--pool_sizes \[2\] has no effect: .* --batch 3 is the one size"),
        (["--mode=consecutive", "--batch=2", "--singles=5"], "--singles 5 has no effect: .* the mode is consecutive"),
        (["--mode=single", "--singles=5"], "--singles 5 has no effect: .*; --records says how many are edited"),
        (["--pool_sizes=2,4", "--singles=5"], r"--singles 5 has no effect: it is of pools of 1, .* \[2,4\]"),
        (["--mode=sequential", "--checkpoints=0,2"], r"checkpoints of at least 1; .*\[0, 2\]"),
        (["--editor=icl"], "two editors are called 'icl'; give each a name"),
        (["--editor=ft_m", "--editor=ft_m"], "two editors are called 'ft_m'"),
        (["--baselines=[]"], "nothing to evaluate: give --editor, or --baselines"),
        (["--protocol=mquake", "--demonstrations.multi_hop=no.txt"], "no file no.txt"),
    ],
)
def test_evaluate_refuses_before_a_model_is_loaded(tmp_path: Path, more: list[str], message: str) -> None:
    data = '--data=[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    with pytest.raises(SystemExit, match=message):
        run(evaluate_command.evaluate, [data, f"--backbone={TINY}", f"--out={tmp_path / 'r.json'}", *more])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--editor={editor}", "--edits={edits}", f"--backbone={TINY}"], "brings its own"),
        (["--editor=nowhere", "--edits={edits}"], "no editor.json"),
        (["--editor={editor}"], "give --edits FILE"),
        (["--editor={editor}", "--edits=missing.jsonl"], "missing.jsonl"),
        (["--editor={editor}", "--edits={bad}"], "row 0"),
    ],
)
def test_edit_says_what_is_wrong(
    exported: Path, edits: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "Lyon is in"}', encoding="utf-8")
    named = {"{editor}": str(exported), "{edits}": str(edits), "{bad}": str(bad)}
    for name, value in named.items():
        arguments = [a.replace(name, value) for a in arguments]
    with pytest.raises(SystemExit) as stop:
        run(edit, arguments)
    assert message in str(stop.value)


def test_evaluate_compares_an_export_with_the_baselines(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    sources = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    small = ["--records=4", "--pool_sizes=[1, 4]", "--singles=2", "--queries_per_kind=1", "--exact_match=false"]
    run(evaluate_command.evaluate, [f"--editor=[{exported}]", f"--data={sources}", f"--out={out}", *small])
    report = json.loads(out.read_text())
    assert set(report["aggregate"]) == {"unedited", "icl", "icl_right_edit", "incomes"}
    assert len(report["records"]["incomes"]["4"]) == 4
    assert len(report["records"]["incomes"]["1"]) == 2
    assert report["aggregate"]["unedited"]["4"]["locality/token_agreement"]["value"] == 1.0
    assert report["meta"]["protocols"]


def test_evaluate_by_uniedits_protocol(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.json"
    sources = '[{"format": "facts_uniedit", "options": {"split": "val", "cities_per_country": 2}}]'
    small = ["--records=3", "--pool_sizes=[3]", "--queries_per_kind=1", "--baselines=[unedited]", "--protocol=uniedit"]
    run(evaluate_command.evaluate, [f"--editor=[{exported}]", f"--data={sources}", f"--out={out}", *small])
    report = json.loads(out.read_text())
    assert report["meta"]["protocols"] == UNIEDIT_PROTOCOLS
    assert {editor: cells["3"]["hops_made"] for editor, cells in report["runs"].items()} == {
        "unedited": "further",
        "incomes": "further",
    }
    assert report["aggregate"]["unedited"]["3"]["locality/uniedit_top_5"]["value"] == 1.0
    assert {"generality/Rep/uniedit_top_5", "generality/MH/uniedit_top_5"} < set(report["aggregate"]["incomes"]["3"])
    screen = capsys.readouterr().out
    heads = [line.split() for line in screen.splitlines() if line.strip().startswith("Editor")]
    assert heads[0] == ["Editor", "Pool", "Reliability", "Generality", "Locality"]
    assert heads[1][:4] == ["Editor", "Pool", "Rep", "MH"]
    assert "UniEdit's protocol" in screen


def test_evaluate_takes_exports_and_training_free_editors_alike(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    sources = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    small = ["--records=2", "--pool_sizes=2", "--exact_match=false", "--baselines=[]", f"--data={sources}"]
    again = "{editor: icl, name: icl_reordered, seed: 1}"
    given = ["--editor", "icl", f"--editor={exported}", "--editor", again]
    run(evaluate_command.evaluate, [*given, f"--out={out}", *small])
    aggregate = json.loads(out.read_text())["aggregate"]
    assert list(aggregate) == ["icl", "incomes", "icl_reordered"]
    assert all("reliability/token_accuracy" in cells["2"] for cells in aggregate.values())
    with pytest.raises(SystemExit, match="nothing to evaluate on"):
        run(evaluate_command.evaluate, ["--editor", "icl", *small])


def test_evaluate_refuses_an_unknown_baseline(exported: Path) -> None:
    with pytest.raises(SystemExit, match="unknown baseline 'rome'"):
        run(evaluate_command.evaluate, [f"--editor=[{exported}]", '--data=[{"format": "facts"}]', "--baselines=[rome]"])
