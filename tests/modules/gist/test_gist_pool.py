"""Pools: what is added, removed, saved and asked does not depend on how it got there."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited
from modules.gist.editor import GistEdited, GistEditor, encode_edits
from modules.gist.model import GistModel
from modules.gist.pool import GistPool

# of several lengths and not in their order, so that a mistaken order shows
REQUESTS = [
    EditRequest("The capital of the far land of Chad is", "Oslo"),
    EditRequest("Rome is in", "Peru"),
    EditRequest(text="Lyon moved to Japan."),
    EditRequest("Bern lies in", "Kenya", subject="Bern"),
]
PROMPTS = ["Rome is in", "Who rules the far land of Chad? It is", "x"]


def same(a: GistPool, b: GistPool, atol: float = 1e-5) -> None:
    assert len(a) == len(b)
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        torch.testing.assert_close(b.tensors()[name], tensor, atol=atol, rtol=1e-5)


def fresh(model: GistModel, requests: list[EditRequest]) -> GistEdited:
    return GistEdited(model, [], GistPool()).add(requests)


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
def test_pool_is_the_same_however_it_was_made(tiny_gists: Callable[..., GistModel], selection: str) -> None:
    model = tiny_gists(selection=selection)
    whole = encode_edits(model, REQUESTS)
    assert (whole.address is None) == (selection == "qk")
    for chunk in (1, 3):
        same(whole, encode_edits(model, REQUESTS, chunk))
    same(whole, GistPool.join([encode_edits(model, [r]) for r in REQUESTS]))
    edited = fresh(model, REQUESTS)
    assert edited.requests == tuple(REQUESTS)
    same(whole, edited.pool)
    same(whole, fresh(model, REQUESTS[:1]).add(REQUESTS[1:]).pool)
    shorter = edited.remove([REQUESTS[1], REQUESTS[3]])
    assert shorter.requests == (REQUESTS[0], REQUESTS[2])
    same(encode_edits(model, [REQUESTS[0], REQUESTS[2]]), shorter.pool)
    same(whole, edited.pool)  # which was not changed
    assert len(edited.remove(REQUESTS).pool) == 0
    assert len(edited.remove(REQUESTS).add(REQUESTS[:2]).pool) == 2


def test_edits_of_one_statement_stand_once(tiny_gists: Callable[..., GistModel]) -> None:
    model = tiny_gists()
    again = EditRequest(text="Rome is in Peru.")  # what REQUESTS[1] states
    edited = fresh(model, [REQUESTS[1], again, REQUESTS[0], REQUESTS[1]])
    assert [r.statement for r in edited.requests] == ["Rome is in Peru.", REQUESTS[0].statement]
    assert len(edited.pool) == 2
    assert len(edited.add([again]).pool) == 2
    assert len(edited.remove([again]).pool) == 1


def test_unknown_edit_cannot_be_removed(tiny_gists: Callable[..., GistModel]) -> None:
    edited = fresh(tiny_gists(), REQUESTS[:2])
    with pytest.raises(ValueError, match=r"Bern lies in Kenya"):
        edited.remove(REQUESTS[1:])


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_save_and_load(tiny_gists: Callable[..., GistModel], tmp_path: Path, selection: str) -> None:
    model = tiny_gists(selection=selection)
    edited = fresh(model, REQUESTS)
    edited.save(tmp_path / "pool")
    assert sorted(p.name for p in (tmp_path / "pool").iterdir()) == ["pool.json", "pool.safetensors"]
    again = GistEdited.load(model, tmp_path / "pool")
    assert again.requests == edited.requests
    same(edited.pool, again.pool, atol=0)
    assert again.generate(PROMPTS, 4) == edited.generate(PROMPTS, 4)
    empty = edited.remove(REQUESTS)
    empty.save(tmp_path / "empty")
    assert len(GistEdited.load(model, tmp_path / "empty").pool) == 0


def test_load_refuses_what_does_not_fit(tiny_gists: Callable[..., GistModel], tmp_path: Path) -> None:
    model = tiny_gists(selection="hidden")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*pool\.safetensors"):
        GistEdited.load(model, tmp_path)
    fresh(model, REQUESTS).save(tmp_path)
    for kind, switches in (("gpt2", {}), ("llama", {"backbone": {"head_dim": 16}})):
        with pytest.raises(ValueError, match="another model"):
            GistEdited.load(tiny_gists(kind, selection="hidden", **switches), tmp_path)
    for switches in ({"layers": "all"}, {"selection": "qk"}):  # layers without gists; addresses that nothing reads
        with pytest.raises(ValueError, match="another model"):
            GistEdited.load(tiny_gists(**({"selection": "hidden"} | switches)), tmp_path)
    lines = json.loads((tmp_path / "pool.json").read_text(encoding="utf-8"))
    (tmp_path / "pool.json").write_text(json.dumps(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match="3 edits"):
        GistEdited.load(model, tmp_path)
    (tmp_path / "pool.json").write_text(json.dumps(lines), encoding="utf-8")
    tensors = load_file(tmp_path / "pool.safetensors")
    save_file({n: t for n, t in tensors.items() if n != "address"}, tmp_path / "pool.safetensors")
    with pytest.raises(ValueError, match="another model"):
        GistEdited.load(model, tmp_path)
    (tmp_path / "pool.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=tmp_path.name):
        GistEdited.load(model, tmp_path)


def test_a_pool_of_another_model_of_the_same_shape_is_refused(
    tiny_gists: Callable[..., GistModel], tmp_path: Path
) -> None:
    model = tiny_gists(selection="hidden")
    fresh(model, REQUESTS).save(tmp_path)
    for name, value in (("keys", "after_rope"), ("match_layer", 0.3)):
        other = tiny_gists(**{"selection": "hidden", name: value})
        other.load_state_dict(model.state_dict())
        with pytest.raises(ValueError, match=rf"{tmp_path.name} was encoded by another model \(other {name}\)"):
            GistEdited.load(other, tmp_path)
    for tensor in (model.gist_embedding, model.language_model.get_parameter("model.layers.0.mlp.up_proj.weight")):
        kept = tensor.detach().clone()
        with torch.no_grad():
            tensor.view(-1)[0] += 1e-3
        with pytest.raises(ValueError, match=r"another model \(other weights\): encode its edits again"):
            GistEdited.load(model, tmp_path)
        with torch.no_grad():
            tensor.copy_(kept)
    assert len(GistEdited.load(model, tmp_path).pool) == 4
    tensors = load_file(tmp_path / "pool.safetensors")
    save_file(tensors, tmp_path / "pool.safetensors")  # as saved before it was told
    with pytest.warns(UserWarning, match="does not say which model encoded it"):
        assert len(GistEdited.load(model, tmp_path).pool) == 4


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
def test_with_leaves_everything_as_it_was(tiny_gists: Callable[..., GistModel], selection: str) -> None:
    model = tiny_gists(selection=selection)
    model.train()
    model.language_model.eval()  # as load_backbone leaves it: modes below may differ
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    editor = GistEditor(model)
    texts = []
    for fails in (False, True):
        try:
            with editor.edit(model.backbone, REQUESTS) as edited:
                assert not any(m.training for m in model.modules())
                texts.append(edited.generate(PROMPTS, 6))
                edited.score(PROMPTS, ["a", "bc", "d"])
                if fails:
                    raise RuntimeError("inside")
        except RuntimeError:
            assert fails
        assert {n: m.training for n, m in model.named_modules()} == modes
        assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert texts[0] == texts[1]


def test_consecutive_edits(tiny_gists: Callable[..., GistModel]) -> None:
    model = tiny_gists(selection="hidden")
    with GistEditor(model).edit(model.backbone, REQUESTS[:2]) as edited:
        first = edited.score(PROMPTS, ["a", "bc", "d"])
        with edited.edit(REQUESTS[2:]) as further, further.edit(REQUESTS[:1]) as same_again:
            assert same_again.requests == tuple(REQUESTS)
            whole = fresh(model, REQUESTS).score(PROMPTS, ["a", "bc", "d"])
            for a, b in zip(further.score(PROMPTS, ["a", "bc", "d"]), whole, strict=True):
                torch.testing.assert_close(a.log_probs, b.log_probs, atol=1e-5, rtol=1e-5)
        for a, b in zip(edited.score(PROMPTS, ["a", "bc", "d"]), first, strict=True):
            assert torch.equal(a.log_probs, b.log_probs)


def test_another_kind_of_model_is_refused(tiny_gists: Callable[..., GistModel], tiny: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match=r"random:llama.*random:gpt2"):
        GistEditor(tiny_gists()).edit(tiny("gpt2"), REQUESTS).__enter__()


@pytest.mark.parametrize("bos", [True, False])
def test_queries_begin_with_a_bos_as_the_unedited_models_do(tiny_gists: Callable[..., GistModel], bos: bool) -> None:
    """Without edits the same scores as the unedited model's; that of queries without one, where the config says so."""
    model = tiny_gists(bos=bos)
    tokenizer = model.backbone.tokenizer
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer._palimpsest_adds_bos = True
    targets = ["a", "bc", "d"]
    found = {
        edited: [s.log_probs for s in edited.score(PROMPTS, targets)]
        for edited in (fresh(model, []), Edited(model.backbone, bos=bos), Edited(model.backbone, bos=not bos))
    }
    mine, same_way, other_way = found.values()
    assert all(map(torch.equal, mine, same_way))
    assert not any(map(torch.equal, mine, other_way))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("selection", ["qk", "hidden"])
@torch.no_grad()
def test_generation_with_cache_equals_without(tiny_gists: Callable[..., GistModel], kind: str, selection: str) -> None:
    """Several prompts of several lengths at once, against one at a time, no cache and no padding."""
    model = tiny_gists(kind, selection=selection)
    edited = fresh(model, REQUESTS)
    plain = fresh(model, [])
    head = model.language_model.get_output_embeddings()
    tokenizer = model.backbone.tokenizer
    expected = []
    for prompt in PROMPTS:
        ids = list(encode(tokenizer, prompt, bos=False).ids)
        start = len(ids)
        for _ in range(6):
            row = torch.tensor([ids])
            out, _ = model(row, torch.ones_like(row), edited.pool)
            ids.append(int(head(out.last_hidden_state[0, -1]).argmax()))
        expected.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    assert edited.generate(PROMPTS, 6) == expected
    assert plain.generate(PROMPTS, 6) != expected
