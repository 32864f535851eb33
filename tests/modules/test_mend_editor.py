"""MEND as an editor: the model stays as it is, and edits are added, removed, merged and kept."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules import summed
from modules.backbone import Backbone
from modules.editor import Edited
from modules.hypernetwork import editor
from modules.hypernetwork.editor import DeltaEdited
from modules.hypernetwork.module import EditedLayers
from modules.interventions import Deltas, merge
from modules.trained.mend import MEND, MendConfig

PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]


def scores(edited: Edited) -> Tensor:
    return torch.cat([s.log_probs for s in edited.score(PROMPTS, TARGETS)])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_editor_leaves_the_model_as_it_was(
    build_mend: Callable[..., MEND], records: list[EditRecord], kind: str
) -> None:
    module = build_mend(kind)
    module.train()
    model = module.deltas.backbone.model
    before, answers = copy.deepcopy(model.state_dict()), scores(Edited(module.deltas.backbone))
    requests = [r.request for r in records]
    with module.editor().edit(module.deltas.backbone, requests) as edited:
        assert not module.deltas.training
        assert not torch.allclose(scores(edited), answers, atol=1e-3)
        assert torch.equal(scores(Edited(module.deltas.backbone)), answers)  # the unedited model can be asked too
        assert edited.generate(PROMPTS, 3) != Edited(module.deltas.backbone).generate(PROMPTS, 3)
    with pytest.raises(RuntimeError, match="inside"), module.editor().edit(module.deltas.backbone, requests):
        raise RuntimeError("inside")
    assert module.deltas.training
    assert torch.equal(scores(Edited(module.deltas.backbone)), answers)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_edits_are_merged_added_to_removed_and_kept(
    build_mend: Callable[..., MEND], records: list[EditRecord], tmp_path: Path, kind: str
) -> None:
    module = build_mend(kind)
    backbone, editor = module.deltas.backbone, module.editor()
    first, second = [r.request for r in records[:2]], [r.request for r in records[2:]]
    with editor.edit(backbone, first) as edited, edited.edit(second) as further:
        assert isinstance(edited, DeltaEdited)
        merged = Edited(Backbone(edited.merge(), backbone.tokenizer, backbone.config))
        torch.testing.assert_close(scores(merged), scores(edited), rtol=1e-4, atol=1e-4)
        # further edits are made from the gradient at the edited model: as editing the merged model would
        with editor.edit(merged.backbone, second) as on_merged:
            torch.testing.assert_close(scores(on_merged), scores(further), rtol=1e-3, atol=1e-3)
        with editor.edit(backbone, [*first, *second]) as at_once:
            assert not torch.allclose(scores(at_once), scores(further), atol=1e-3)
            torch.testing.assert_close(scores(at_once.remove(second)), scores(edited), rtol=1e-4, atol=1e-4)
            assert at_once.add(first) is not at_once
            assert torch.equal(scores(at_once.add(first)), scores(at_once))
        further.save(tmp_path)
        loaded = DeltaEdited.load(module.deltas, tmp_path)
        assert torch.equal(scores(loaded), scores(further))
        assert loaded.requests == further.requests == (*first, *second)
        with pytest.raises(ValueError, match="cannot be removed"):
            edited.remove(second)
    for name in ("deltas.safetensors", "edits.json"):
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"holds no {name}"):
            DeltaEdited.load(module.deltas, tmp_path)
        (tmp_path / "away").rename(tmp_path / name)
    other = build_mend(kind, layers=EditedLayers([0]))
    with pytest.raises(ValueError, match="other layers"):
        DeltaEdited.load(other.deltas, tmp_path)


def test_further_edits_within_inference_mode(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    """As Lightning validates: the gradient of the second edit goes through the first."""
    module = build_mend()
    backbone, first, second = module.deltas.backbone, [records[0].request], [records[1].request]
    with module.editor().edit(backbone, first) as edited, edited.edit(second) as further:
        expected = scores(further)
    with torch.inference_mode(), module.editor().edit(backbone, first) as edited, edited.edit(second) as further:
        torch.testing.assert_close(scores(further), expected)


def test_many_edits_at_once_are_the_sum_of_each(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    """Also where there are more tokens than features, so that the sum is kept as a matrix, and more than one chunk."""
    module = build_mend()
    requests = [EditRequest(f"Town {i} is in", f"Land {i % 5}") for i in range(40)]
    backbone = module.deltas.backbone
    model = copy.deepcopy(backbone.model)
    for request in requests:
        with module.editor().edit(backbone, [request]) as one:
            merge(model, one.weight_changes())
    with module.editor().edit(backbone, requests) as edited:
        assert max(d.a.shape[0] for d in edited.deltas.values()) > 300
        assert all(t.whole is not None and len(t.a) <= 48 * 32 / (48 + 32) for t in edited.terms.values())
        written = Edited(Backbone(model, backbone.tokenizer, backbone.config))
        torch.testing.assert_close(scores(edited), scores(written), rtol=1e-3, atol=2e-3)


def test_edits_of_one_call_are_joined_once(build_mend: Callable[..., MEND], monkeypatch: pytest.MonkeyPatch) -> None:
    """Joined one after the other, all that is there would be copied for each; within inference mode too, later edits'
    gradients go through them."""
    monkeypatch.setattr(editor, "CHUNK", 3)
    module = build_mend()
    requests = [EditRequest(f"Town {i} is in", f"Land {i}") for i in range(8)]
    edited = DeltaEdited(module.deltas, module.deltas.backbone)
    parts = [edited.further(requests[at : at + 3])[0] for at in (0, 3, 6)]
    monkeypatch.setattr(Deltas, "then", lambda *_: pytest.fail("copied"))
    with torch.inference_mode():
        whole, _ = edited.further(requests)
    for name, deltas in whole.items():
        assert not any(t.is_inference() for t in deltas)
        assert torch.equal(deltas.a, torch.cat([part[name].a for part in parts]))
        assert torch.equal(deltas.b, torch.cat([part[name].b for part in parts]))
        assert torch.equal(deltas.edit, torch.cat([part[name].edit + 3 * i for i, part in enumerate(parts)]))
    assert edited.further([]) == ({}, {})


def test_an_edit_costs_the_same_however_many_there_are(
    build_mend: Callable[..., MEND], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One by one: no sum is made anew, and it is that of the same edits at once, bit by bit."""
    module = build_mend(mend=MendConfig(rank=8, edit_lr=5e-4))
    requests = [EditRequest(f"Town {i} is in", f"Land {i % 5}") for i in range(12)]
    product, tokens = summed._product, 0

    def counted(a: Tensor, b: Tensor) -> Tensor:
        nonlocal tokens
        tokens += len(a)
        return product(a, b)

    monkeypatch.setattr(summed, "_product", counted)
    with module.editor().edit(module.deltas.backbone, []) as edited:
        for i, request in enumerate(requests):
            was, tokens = len(edited.requests), 0
            with monkeypatch.context() as m:
                m.setattr(DeltaEdited, "deltas", property(lambda _: pytest.fail("earlier edits are looked at")))
                edited = edited.add([request, requests[0]])
            assert len(edited.requests) == was + 1 == i + 1
            # of each matrix what was still in factors, at most, and the edit itself
            assert tokens <= len(edited.terms) * (48 * 32 // (48 + 32) + 20)
        assert all(t.whole is not None for t in edited.terms.values())
        edited.save(tmp_path)
        whole = DeltaEdited.load(module.deltas, tmp_path)
        few = DeltaEdited(module.deltas, module.deltas.backbone).joined(requests[:7], *_part(edited, 0, 7))
        for other in (whole, few.joined(requests[7:], *_part(edited, 7, 12)), edited.add(requests)):
            assert other.requests == tuple(requests)
            for name, term in edited.terms.items():
                assert torch.equal(other.terms[name].weight(), term.weight())
                at_once = edited.deltas[name].term(1, torch.zeros(12).long()).weight()
                torch.testing.assert_close(term.weight(), at_once, rtol=1e-5, atol=1e-5)
        less = edited.remove(requests[3:11])
        kept = [torch.tensor([0, 1, 2, 11])]
        for name, term in less.terms.items():
            wanted = edited.deltas[name].keep(*kept).term(1, torch.zeros(4).long()).weight()
            torch.testing.assert_close(term.weight(), wanted, rtol=1e-5, atol=1e-5)
        # an edit that a later one overruled is made again
        other = EditRequest(requests[0].prompt, "Peru")
        again = edited.add([other]).add([requests[0]])
        assert again.requests == (*requests, other, requests[0])


def _part(edited: DeltaEdited, first: int, end: int) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
    return {name: d.keep(torch.arange(first, end)) for name, d in edited.deltas.items()}, {}
