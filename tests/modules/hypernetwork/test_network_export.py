"""An exported hypernetwork edits as the trained one did, and is all that the folder holds."""

import json
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.records import EditRecord
from modules.backbone import Backbone, BackboneConfig
from modules.export import export, load_editor
from modules.hypernetwork.editor import DeltaEditor
from modules.hypernetwork.module import EditedLayers
from modules.trained.mend import MEND, MendConfig


@pytest.fixture
def trained(tiny_config: Callable[..., BackboneConfig], records: list[EditRecord]) -> MEND:
    module = MEND(tiny_config("qwen3"), EditedLayers([1, -1], ["mlp.down_proj"]), MendConfig(rank=5, edit_lr=0.03))
    module.configure_model()
    module.calibrate(records)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.05 * torch.randn_like(p)
    return module


def scores(editor: DeltaEditor, records: list[EditRecord]) -> torch.Tensor:
    with editor.edit(editor.reader, [r.request for r in records]) as edited:
        return torch.cat([s.log_probs for s in edited.score(["City A is in", "Who?"], ["Land 0", "me"])])


def test_export_and_back(trained: MEND, records: list[EditRecord], tmp_path: Path) -> None:
    expected = scores(trained.editor(), records)
    folder = tmp_path / "out"
    export(trained, folder, {"step": 7})
    assert {p.name for p in folder.iterdir()} == {"editor.json", "editor.safetensors"}
    saved = load_file(folder / "editor.safetensors")
    assert sum(t.numel() for t in saved.values()) == sum(t.numel() for t in trained.state_dict().values())
    editor = load_editor(folder)
    assert isinstance(editor, DeltaEditor)
    assert editor.name == "mend"
    assert torch.equal(scores(editor, records), expected)
    assert not any(p.requires_grad for p in editor.model.parameters())
    assert not any(m.training for m in editor.model.modules())
    about = json.loads((folder / "editor.json").read_text(encoding="utf-8"))
    assert (about["editor"], about["step"], about["settings"]["mend"]["rank"]) == ("mend", 7, 5)


def test_what_does_not_fit_is_named(trained: MEND, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(trained, folder)
    with pytest.raises(FileExistsError, match="is not empty"):
        export(trained, folder)
    file = folder / "editor.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if n != "edit_lr"}, file)
    with pytest.raises(ValueError, match=r"missing.*edit_lr"):
        load_editor(folder)
    save_file(whole | {"edit_lr": torch.ones(9)}, file)
    with pytest.raises(ValueError, match=r"another shape.*edit_lr"):
        load_editor(folder)
    file.unlink()
    with pytest.raises(ValueError, match=r"has no editor\.safetensors"):
        load_editor(folder)
    facts = (folder / "editor.json").read_text(encoding="utf-8")
    for wrong in (facts.replace('"mend": {', '"else": {'), facts.replace('"editor": "mend"', '"editor": "serac"')):
        (folder / "editor.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(ValueError, match=r"editor\.json cannot be read"):
            load_editor(folder)


def test_another_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="LightningModule cannot be exported; there are: incomes, mend"):
        export(L.LightningModule(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def foreign(tiny: Callable[..., Backbone], tmp_path: Path) -> Path:
    """A model's folder that brings code of its own, which leaves a file `ran` where it is run."""
    folder = tmp_path / "foreign"
    backbone = tiny()
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    told |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(told), encoding="utf-8")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("inside", [(), ("backbone",), ("scope", "encoder"), ("counterfactual",)])
def test_an_export_runs_no_code_that_the_user_does_not_trust(
    trained: MEND, tmp_path: Path, foreign: Path, inside: tuple[str, ...]
) -> None:
    """Whatever its editor.json asks for."""
    folder = tmp_path / "out"
    export(trained, folder)
    file = folder / "editor.json"
    about = json.loads(file.read_text(encoding="utf-8"))
    about["backbone"]["source"] = str(foreign)
    part = about
    for name in inside:
        part = part.setdefault(name, {})
    part["trust_remote_code"] = True
    file.write_text(json.dumps(about), encoding="utf-8")
    told = "--trust_remote_code true" if inside else "foreign"  # beside the models nobody heeds it
    with pytest.raises(ValueError, match=told):
        load_editor(folder)
    assert not (tmp_path / "ran").exists()
    if inside == ("backbone",):
        with pytest.raises(ValueError, match=r"has no attribute .Own"):  # the code runs, and is no model
            load_editor(folder, trust_remote_code=True)
        assert (tmp_path / "ran").exists()
