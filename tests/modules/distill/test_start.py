"""What a student starts from: any editor's weights, in force in the student and absent in the teacher."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord
from modules import training_free
from modules.backbone import Backbone, adapters_off
from modules.distill import start
from modules.distill.start import make, read
from modules.distill.student import AdapterOptions, Student
from modules.editor import Editor
from modules.interventions import low_rank
from modules.training_free import FTM, LoRA
from modules.training_free.icl import Unedited

IDS, MASK = torch.arange(40).view(2, 20), torch.ones(2, 20, dtype=torch.long)


def states(backbone: Backbone) -> torch.Tensor:
    with torch.no_grad():
        return backbone.model.base_model(input_ids=IDS, attention_mask=MASK, use_cache=False).last_hidden_state


@pytest.mark.parametrize(
    ("kind", "editor", "targets"),
    [
        ("llama", FTM(layers=[1], steps=2, lr=0.1), ["q_proj", "v_proj"]),  # dense
        ("llama", LoRA(steps=2, lr=0.1), ["q_proj", "v_proj"]),  # on the adapters' own layers
        ("gpt2", LoRA(steps=2, lr=0.1), ["c_attn"]),
        ("gpt_neox", LoRA(steps=2, lr=0.1), ["query_key_value"]),
    ],
)
def test_in_force_in_the_student_and_absent_in_the_teacher(
    tiny: Callable[..., Backbone],
    records: list[EditRecord],
    tmp_path: Path,
    kind: str,
    editor: Editor,
    targets: list[str],
) -> None:
    backbone = tiny(kind)
    requests = [r.request for r in records]
    unedited = states(backbone)
    with editor.edit(backbone, requests) as edited:
        changes = edited.weight_changes()
        expected = edited.decode(IDS, MASK)[0].last_hidden_state
    assert not torch.allclose(expected, unedited, atol=1e-2)
    terms = read(make(editor, backbone, requests, "w", tmp_path), backbone)
    assert terms.keys() == changes.keys()
    dense = isinstance(editor, FTM)
    assert all((t.whole is not None, len(t.a) > 0) == (dense, not dense) for t in terms.values())  # no identity is kept

    student = Student(backbone, AdapterOptions(targets=targets), terms).eval()
    with torch.no_grad():
        torch.testing.assert_close(student(IDS, MASK), expected, atol=1e-5, rtol=1e-5)  # adapters are zero
    with adapters_off(student.language_model):
        assert torch.equal(states(backbone), unedited)
    for name, p in student.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            p.data += 0.1 * torch.randn_like(p)
    with torch.no_grad():
        trained = student(IDS, MASK)
    assert not torch.allclose(trained, expected, atol=1e-3)
    with adapters_off(student.language_model):
        assert torch.equal(states(backbone), unedited)
    fresh = tiny(kind)
    with low_rank(fresh.model, student.terms()):
        torch.testing.assert_close(states(fresh), trained, atol=1e-4, rtol=1e-4)


def test_made_once(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, requests = tiny(), [r.request for r in records]
    first = make(LoRA(steps=1), backbone, requests, "w", tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(start, "keep", lambda *_: pytest.fail("made again"))
        assert make(LoRA(steps=1), backbone, requests, "w", tmp_path) == first
    others = [make(LoRA(steps=2), backbone, requests, "w", tmp_path)]
    others += [make(LoRA(steps=1), backbone, requests[1:], "w", tmp_path)]
    others += [make(LoRA(steps=1), backbone, requests, "v", tmp_path)]
    assert len({first, *others}) == 4
    assert not list(tmp_path.glob(".*"))


def test_edits_that_an_editor_has_saved(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path
) -> None:
    """One row of deltas for each edit, as closed-form editors and hypernetworks write them."""
    from modules.interventions import Deltas
    from modules.training_free.locate import LocatedEdited
    from modules.training_free.memit import MEMIT

    backbone = tiny()
    name = "model.layers.1.mlp.down_proj"
    deltas = {name: Deltas(torch.randn(4, 48), torch.randn(4, 32), torch.arange(4))}
    editor = MEMIT(layers=[1])
    LocatedEdited(editor, backbone, [r.request for r in records], deltas).save(tmp_path)
    (term,) = read(tmp_path, backbone).values()
    torch.testing.assert_close(term.weight()[0], deltas[name].a.T @ deltas[name].b)
    wide = tiny(intermediate_size=64)
    with pytest.raises(ValueError, match="of a model of another size"):
        read(tmp_path, wide)


def test_what_cannot_be_started_from(tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path) -> None:
    backbone = tiny()
    with pytest.raises(ValueError, match="the edits of unedited are no change of weights"):
        make(Unedited(), backbone, [r.request for r in records], "w", tmp_path)
    with pytest.raises(ValueError, match=r"holds no deltas\.safetensors.*trainers\.edit --editor memit"):
        read(tmp_path / "nothing", backbone)
    (tmp_path / "deltas.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path, backbone)


def test_targets_that_are_not_there(tiny: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match=r"model\.adapters\.targets \['query'\].*q_proj"):
        Student(tiny(), AdapterOptions(targets=["query"]), {})
    for wrong in ("query", "mlp", "proj"):  # beside one that is there; no linear layer; the end of a name's part
        with pytest.raises(ValueError, match=rf"no linear layer's name ends in '{wrong}'; .*v_proj"):
            AdapterOptions(targets=["q_proj", wrong]).check(tiny())
    AdapterOptions(targets=["self_attn.q_proj", "model.layers.1.mlp.down_proj"]).check(tiny())
    AdapterOptions(targets=["c_attn"]).check(tiny("gpt2"))


@pytest.mark.parametrize("kind", ["MEMIT", "PMET", "EMMET", "AlphaEdit", "ROME", "RROME", "FTL", "FTM", "LoRA"])
def test_editors_are_known_by_their_settings(kind: str) -> None:
    """Two of the same settings are the same editor, so that what one has made the other need not make again."""
    one, two = (pickle.dumps(getattr(training_free, kind)(), protocol=4) for _ in range(2))
    assert one == two


def test_two_runs_may_make_the_same_start_at_once(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, requests = tiny(), [r.request for r in records]
    place = make(FTM(layers=[1], steps=2, lr=0.1), backbone, requests, "w", tmp_path / "alone")
    whole, keep = tmp_path / "both" / place.name, start.keep

    def slower(changes: Any, asked: Any, folder: Path) -> None:
        keep(changes, asked, folder)
        keep(changes, asked, whole)  # the other run is done first

    monkeypatch.setattr(start, "keep", slower)
    made = make(FTM(layers=[1], steps=2, lr=0.1), backbone, requests, "w", tmp_path / "both")
    assert made == whole
    assert [p.name for p in whole.parent.iterdir()] == [whole.name]  # and nothing is left over
    assert read(made, backbone).keys() == read(place, backbone).keys()

    def elsewhere(changes: Any, asked: Any, folder: Path) -> None:
        keep(changes, asked, folder)
        whole.mkdir(exist_ok=True)
        (whole / "other").touch()

    monkeypatch.setattr(start, "keep", elsewhere)
    (whole / start.FILE).unlink()
    with pytest.raises(OSError, match="not empty"):
        make(FTM(layers=[1], steps=2, lr=0.1), backbone, requests, "w", tmp_path / "both")
