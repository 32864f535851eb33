"""An exported editor answers as the trained one did, and is read by transformers and peft alone."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from datamodules.records import EditRecord
from modules.backbone import Backbone, BackboneConfig
from modules.editor import Edited
from modules.export import export, load_editor
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions

PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]


@pytest.fixture
def trained(tiny: Callable[..., Backbone], tmp_path: Path) -> Callable[..., InComeS]:
    """A module on a saved folder (as a hub model would be), its trained parameters moved away from the start."""

    def make(kind: str = "llama", **options: Any) -> InComeS:
        backbone = tiny(kind, tie_word_embeddings=True)
        base = tmp_path / "base"
        backbone.model.save_pretrained(base)
        backbone.tokenizer.save_pretrained(base)
        options.setdefault("gist", GistConfig(selection="both"))
        options.setdefault("lora", LoraOptions(4, 8, ["q_proj", "k_proj", "v_proj", "down_proj"]))
        module = InComeS(BackboneConfig(str(base)), **options)
        module.configure_model()
        with torch.no_grad():
            for p in module.parameters():
                if p.requires_grad:
                    p += 0.05 * torch.randn_like(p)
            if module.gists.matcher is not None:
                module.gists.matcher.mean += 0.05
        module.gists.eval()
        return module

    return make


def scores(editor: Any, records: list[EditRecord]) -> torch.Tensor:
    with editor.edit(editor.model.backbone, [r.request for r in records]) as edited:
        return torch.cat([s.log_probs for s in edited.score(PROMPTS, TARGETS)])


CASES = [("full", "student"), ("full", "original"), ("upper", "student"), ("upper", "original"), ("lora", "student")]


@pytest.mark.parametrize(("train", "reader"), [*CASES, ("lora", "original")])
def test_export_and_back(
    trained: Callable[..., InComeS], records: list[EditRecord], tmp_path: Path, train: str, reader: str
) -> None:
    module = trained(train=train, reader=reader)
    expected = scores(module.editor(), records)
    folder = tmp_path / "out"
    export(module, folder, {"step": 7})
    ids = torch.arange(20)[None]

    # transformers and peft read it
    if train == "lora":
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        assert not torch.allclose(base(ids).logits, module.gists.language_model(ids).logits, atol=1e-3)
        loaded = PeftModel.from_pretrained(base, folder)
        torch.testing.assert_close(loaded(ids).logits, module.gists.language_model(ids).logits)
        assert not (folder / "config.json").exists()
    else:
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(loaded(ids).logits, module.gists.reader.model(ids).logits)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight  # still tied
        assert "gist" not in (folder / "config.json").read_text(encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("Zürich is").input_ids == module.tokenizer("Zürich is").input_ids

    # and so does this project
    editor = load_editor(folder)
    assert torch.equal(scores(editor, records), expected)
    assert not any(p.requires_grad for p in editor.model.parameters())
    assert not any(m.training for m in [*editor.model.modules(), *editor.reader.model.modules()])
    about = json.loads((folder / "editor.json").read_text(encoding="utf-8"))
    assert (about["step"], about["train"], about["reader"]) == (7, train, reader)
    assert {"torch", "transformers"} <= about["versions"].keys()

    # nothing in it runs code when it is read
    endings = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert endings <= {".json", ".safetensors", ".txt", ".jinja", ".md"}


@pytest.mark.parametrize(("train", "reader"), [("full", "student"), ("upper", "student"), ("upper", "original")])
def test_no_model_is_copied_for_a_teacher_that_nobody_asks(
    trained: Callable[..., InComeS], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, reader: str
) -> None:
    """The original that reads is the one copy there has to be."""
    export(trained(train=train, reader=reader), tmp_path / "out")
    copied: list[Any] = []

    def deepcopy(model: Any) -> Any:
        copied.append(model)
        return copy.deepcopy(model)

    monkeypatch.setattr("modules.trained.incomes.copy", SimpleNamespace(deepcopy=deepcopy))
    load_editor(tmp_path / "out")
    assert len(copied) == (reader == "original")


def test_an_export_is_loaded_without_kernels_of_cuda(
    trained: Callable[..., InComeS], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = trained(train="lora")
    module.backbone_config.liger = True
    export(module, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "editor.json").read_text())["backbone"]["liger"]
    patched: list[Any] = []
    monkeypatch.setattr("modules.backbone._apply_liger", patched.append)
    load_editor(tmp_path / "out")
    assert not patched


@pytest.mark.parametrize("kind", ["qwen3", "gpt2", "gpt_neox", "gptj"])
def test_other_architectures(
    trained: Callable[..., InComeS], records: list[EditRecord], tmp_path: Path, kind: str
) -> None:
    module = trained(kind, train="full")
    expected = scores(module.editor(), records)
    export(module, tmp_path / "out")
    assert torch.equal(scores(load_editor(tmp_path / "out"), records), expected)
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(loaded(ids).logits, module.gists.reader.model(ids).logits)


def test_a_teacher_of_lower_precision(
    trained: Callable[..., InComeS], records: list[EditRecord], tmp_path: Path
) -> None:
    """The original that answers is stored as it was, in bfloat16, and computes as the backbone's config says."""
    module = trained(train="upper", reader="original", teacher_dtype="bfloat16")
    expected = scores(module.editor(), records)
    export(module, tmp_path / "out")
    editor = load_editor(tmp_path / "out")
    assert editor.reader.model.dtype == torch.float32
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    found = scores(editor, records)
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0.05)
    unedited = torch.cat([s.log_probs for s in Edited(editor.reader).score(PROMPTS, TARGETS)])
    assert (found - expected).abs().sum() < (found - unedited).abs().sum()


def test_the_bos_of_queries_is_kept_and_exports_from_before_have_none(
    trained: Callable[..., InComeS], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export(trained(), folder)
    file = folder / "editor.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    for told, expected in ((True, True), (False, False), (None, False)):
        facts["gist"]["bos"] = told
        if told is None:
            del facts["gist"]["bos"]
        file.write_text(json.dumps(facts), encoding="utf-8")
        editor: Any = load_editor(folder)
        with editor.edit(editor.reader, []) as edited:
            assert edited.bos is expected


def test_an_export_from_before_all_layers_heeded_the_match_layer(
    trained: Callable[..., InComeS], records: list[EditRecord], tmp_path: Path
) -> None:
    module = trained(gist=GistConfig(layers="all", selection="both", match_layer=0.0))
    expected = scores(module.editor(), records)
    export(module, tmp_path / "out")
    file = tmp_path / "out" / "editor.json"
    facts = json.loads(file.read_text(encoding="utf-8"))
    facts["gist"]["match_layer"] = 0.5  # half the depth, and yet the first layer's input was matched
    del facts["gist"]["bos"]  # which is how they are known
    file.write_text(json.dumps(facts), encoding="utf-8")
    assert torch.equal(scores(load_editor(tmp_path / "out"), records), expected)


def test_adapters_on_a_random_base_find_it_again(records: list[EditRecord], tmp_path: Path, tiny_config) -> None:
    module = InComeS(tiny_config(), train="lora", lora=LoraOptions(4, 8, ["k_proj"]))
    module.configure_model()
    expected = scores(module.editor(), records)
    torch.rand(3)
    export(module, tmp_path / "out")
    assert torch.equal(scores(load_editor(tmp_path / "out"), records), expected)


def test_a_folder_in_use_is_refused(trained: Callable[..., InComeS], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(FileExistsError, match="out is not empty"):
        export(trained(), tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_missing_files_are_named(trained: Callable[..., InComeS], tmp_path: Path, train: str) -> None:
    with pytest.raises(ValueError, match=r"no editor\.json"):
        load_editor(tmp_path / "nowhere")
    folder = tmp_path / "out"
    export(trained(train=train), folder)
    weights = "adapter_model.safetensors" if train == "lora" else "model.safetensors"
    for name in ("editor.safetensors", weights):
        kept = (folder / name).read_bytes()
        for content in (None, kept[:100], b""):
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{folder.name}.*"):
                load_editor(folder)
            (folder / name).write_bytes(kept)
    facts = folder / "editor.json"
    kept = facts.read_text(encoding="utf-8")
    for content in (
        "{",
        "[]",
        json.dumps({"format": 1, "editor": "incomes"}),
        kept.replace('"format": 1', '"format": 9'),
    ):
        facts.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=r"editor\.json"):
            load_editor(folder)


def test_tensors_that_do_not_fit_are_named(trained: Callable[..., InComeS], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export(trained(), folder)
    file = folder / "editor.safetensors"
    whole = load_file(file)
    save_file({n: t for n, t in whole.items() if n != "gist_embedding"}, file)
    with pytest.raises(ValueError, match=r"missing.*gist_embedding"):
        load_editor(folder)
    save_file(whole | {"more": torch.ones(1)}, file)
    with pytest.raises(ValueError, match=r"unknown.*more"):
        load_editor(folder)
    save_file(whole | {"gist_embedding": torch.ones(5)}, file)
    with pytest.raises(ValueError, match=r"gist_embedding"):
        load_editor(folder)
