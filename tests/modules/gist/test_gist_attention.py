"""Gists inside real attention: six architectures, with a pool and without."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.backbone import PARTS, Backbone
from modules.gist.model import GistConfig, GistModel
from modules.gist.pool import GistPool

KINDS = sorted(PARTS)
EDITS = ["Lyon is a city in Japan.", "Rome is in Peru.", "The capital of Chad is Oslo."]
TEXTS = ["Lyon is in the country of", "Who rules Rome?", "x"]


def rows(backbone: Backbone, texts: list[str], width: int = 0, side: str = "right") -> tuple[Tensor, Tensor]:
    """Padded to at least `width`, with a token that is not zero."""
    ids = [backbone.tokenizer(t)["input_ids"] for t in texts]
    width = max([width, *map(len, ids)])
    gaps = [[0] * (width - len(r)) for r in ids]
    if side == "left":
        padded, mask = (
            [[7] * len(g) + r for g, r in zip(gaps, ids, strict=True)],
            [g + [1] * len(r) for g, r in zip(gaps, ids, strict=False)],
        )
    else:
        padded, mask = (
            [r + [7] * len(g) for g, r in zip(gaps, ids, strict=True)],
            [[1] * len(r) + g for g, r in zip(gaps, ids, strict=False)],
        )
    return torch.tensor(padded), torch.tensor(mask)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_without_a_pool_the_model_is_what_it_was(tiny: Callable[..., Backbone], kind: str, selection) -> None:
    backbone = tiny(kind)
    untouched = copy.deepcopy(backbone.model)
    model = GistModel(backbone, GistConfig(selection=selection)).eval()
    ids, mask = rows(backbone, TEXTS)
    one, ones = rows(backbone, TEXTS[:1])
    for i, m in ((ids, mask), (one, ones)):
        expected = untouched(input_ids=i, attention_mask=m).logits
        kept = m.bool()  # what stands at padding is nobody's business
        assert torch.equal(backbone.model(input_ids=i, attention_mask=m).logits[kept], expected[kept])
        hidden = untouched.base_model(input_ids=i, attention_mask=m, use_cache=False).last_hidden_state
        for pool in (None, GistPool()):
            assert torch.equal(model(i, m, pool)[0].last_hidden_state[kept], hidden[kept])
    # nor after a pool has been written and read
    model(ids, mask, model.compress(ids, mask))
    kept = mask.bool()
    assert torch.equal(
        backbone.model(input_ids=ids, attention_mask=mask).logits[kept],
        untouched(input_ids=ids, attention_mask=mask).logits[kept],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_padding_changes_nothing(tiny_gists: Callable[..., GistModel], kind: str, selection: str) -> None:
    model = tiny_gists(kind, selection=selection)
    pool = model.compress(*rows(model.backbone, EDITS))
    assert (len(pool), set(pool.layers)) == (3, {2, 3})
    wide = model.compress(*rows(model.backbone, EDITS, 40))
    alone = [model.compress(*rows(model.backbone, [e])) for e in EDITS]
    for other in (wide, GistPool.join(alone)):
        for name, tensor in pool.tensors().items():
            torch.testing.assert_close(other.tensors()[name], tensor, atol=1e-5, rtol=1e-5)

    ids, mask = rows(model.backbone, TEXTS)
    out = model(ids, mask, pool)[0].last_hidden_state
    plain = model(ids, mask, None)[0].last_hidden_state
    assert not torch.allclose(out[mask.bool()], plain[mask.bool()], atol=1e-2)  # or nothing is read
    wide_out = model(*rows(model.backbone, TEXTS, 40), pool)[0].last_hidden_state
    left, left_mask = rows(model.backbone, TEXTS, 40, "left")
    positions = (left_mask.cumsum(1) - 1).clamp(min=0)
    left_out = model(left, left_mask, pool, position_ids=positions)[0].last_hidden_state
    for b, text in enumerate(TEXTS):
        single = model(*rows(model.backbone, [text]), pool)[0].last_hidden_state[0]
        n = len(single)
        torch.testing.assert_close(out[b, :n], single, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(wide_out[b, :n], single, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(left_out[b, -n:], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_gist_keys_are_the_layers_own(tiny_gists: Callable[..., GistModel], kind: str) -> None:
    """Before RoPE: what the key projection (Qwen3: its norm) gives at the gist token. After it: what the cache has."""
    model = tiny_gists(kind, keys="before_rope")
    backbone = model.backbone
    rotated = tiny_gists(kind, keys="after_rope")
    rotated.load_state_dict(model.state_dict())
    ids, _ = rows(backbone, EDITS[:1])
    at = ids.shape[1]
    embeds = torch.cat([backbone.embed(ids), model.gist_embedding[None, None]], dim=1)
    projected: dict[int, Tensor] = {}
    for i in model.active:
        keys = backbone.attention(i).get_submodule(backbone.parts.keys)
        keys.register_forward_hook(lambda _, __, out, i=i: projected.update({i: out[0, -1]}))
    cache = backbone.model.base_model(inputs_embeds=embeds, use_cache=True).cache
    before, after = (m.compress(ids, torch.ones_like(ids)) for m in (model, rotated))
    for i in model.active:
        key = projected[i]
        if kind == "gpt_neox":
            key = key.view(4, 3, 8)[:, 1]  # a head's query, key and value stand side by side
        elif kind == "gpt2":
            key = key.view(3, 4, 8)[1]
        key = key.reshape(backbone.key_value_heads, 8)
        torch.testing.assert_close(before.layers[i].keys[0], key, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(after.layers[i].keys[0], cache.layers[i].keys[0, :, at], atol=1e-6, rtol=1e-5)
        for pool in (before, after):
            torch.testing.assert_close(pool.layers[i].values[0], cache.layers[i].values[0, :, at], atol=1e-6, rtol=1e-5)
        assert torch.allclose(key, cache.layers[i].keys[0, :, at], atol=1e-4) == (kind == "gpt2")  # which never rotates


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_is_read_is_added_before_the_output_projection(tiny_gists: Callable[..., GistModel], kind: str) -> None:
    """The first active layer's attention output differs by the projection of what its selector gave, and by no more."""
    model = tiny_gists(kind, selection="qk")
    pool = model.compress(*rows(model.backbone, EDITS))
    ids, mask = rows(model.backbone, TEXTS[:1])
    first = model.active.start
    attention = model.backbone.attention(first)
    name = next(n for n in ("o_proj", "c_proj", "dense", "out_proj") if hasattr(attention, n))
    inputs: list[Tensor] = []
    attention.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    given: list[Tensor] = []
    model.selectors[str(first)].register_forward_hook(lambda _, __, out: given.append(out[0]))
    model(ids, mask, pool)
    model(ids, mask, None)
    torch.testing.assert_close(inputs[0] - inputs[1], given[0].flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_decoding_token_by_token_equals_the_whole_pass(
    tiny_gists: Callable[..., GistModel], kind: str, selection: str
) -> None:
    model = tiny_gists(kind, selection=selection)
    pool = model.compress(*rows(model.backbone, EDITS))
    ids, mask = rows(model.backbone, TEXTS[:1])
    whole = model(ids, mask, pool)[0].last_hidden_state
    cache, carried, parts = None, None, []
    for at in (range(4), *([i] for i in range(4, ids.shape[1]))):
        step = ids[:, list(at)]
        out, carried = model(step, torch.ones(1, at[-1] + 1).long(), pool, carried=carried, use_cache=True, cache=cache)
        cache = out.cache
        parts.append(out.last_hidden_state)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_order_of_edits_does_not_matter(tiny_gists: Callable[..., GistModel], selection: str) -> None:
    model = tiny_gists(selection=selection)
    pool = model.compress(*rows(model.backbone, EDITS))
    ids, mask = rows(model.backbone, TEXTS)
    order = [2, 0, 1]
    trace: dict[int, Tensor] = {}
    shuffled: dict[int, Tensor] = {}
    out = model(ids, mask, pool, trace=trace)[0].last_hidden_state
    other = model(ids, mask, pool.keep(order), trace=shuffled)[0].last_hidden_state
    torch.testing.assert_close(other, out, atol=1e-6, rtol=1e-6)
    assert set(trace) == {2, 3}
    for i, logp in trace.items():
        torch.testing.assert_close(shuffled[i], logp[..., [*order, 3]], atol=1e-6, rtol=1e-5)
    traced = model(ids, mask, pool, trace={})[0].last_hidden_state
    fused = model(ids, mask, pool)[0].last_hidden_state
    torch.testing.assert_close(traced, fused, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_what_a_row_does_not_see_is_not_there(tiny_gists: Callable[..., GistModel], selection: str) -> None:
    model = tiny_gists(selection=selection)
    pool = model.compress(*rows(model.backbone, EDITS))
    ids, mask = rows(model.backbone, TEXTS[:2])
    visible = torch.tensor([[True, False, True], [False, True, False]])
    for trace in (None, {}):
        out = model(ids, mask, pool, visible, trace=trace)[0].last_hidden_state
        for b, text in enumerate(TEXTS[:2]):
            part = pool.keep(visible[b].nonzero()[:, 0].tolist())
            single = model(*rows(model.backbone, [text]), part)[0].last_hidden_state[0]
            torch.testing.assert_close(out[b, : len(single)], single, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("zero_gist", [True, False])
@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@torch.no_grad()
def test_zero_gist_switch(tiny_gists: Callable[..., GistModel], selection: str, zero_gist: bool) -> None:
    model = tiny_gists(selection=selection, zero_gist=zero_gist)
    pool = model.compress(*rows(model.backbone, EDITS))
    ids, mask = rows(model.backbone, TEXTS)
    trace: dict[int, Tensor] = {}
    out = model(ids, mask, pool, trace=trace)[0].last_hidden_state
    torch.testing.assert_close(out, model(ids, mask, pool)[0].last_hidden_state, atol=1e-5, rtol=1e-5)
    for logp in trace.values():
        torch.testing.assert_close(logp.exp().sum(-1), torch.ones(logp.shape[:2]))
        over_edits = logp.exp()[..., :-1].sum(-1)
        if zero_gist:
            assert (over_edits < 1 - 1e-6).any()
        else:
            torch.testing.assert_close(over_edits, torch.ones_like(over_edits))


@torch.no_grad()
def test_zero_gist_forced_on_makes_an_edit_void(tiny_gists: Callable[..., GistModel]) -> None:
    for selection in ("hidden", "qk"):
        model = tiny_gists(selection=selection)
        pool = model.compress(*rows(model.backbone, EDITS))
        ids, mask = rows(model.backbone, TEXTS[:1])
        plain = model(ids, mask, None)[0].last_hidden_state
        assert not torch.allclose(model(ids, mask, pool)[0].last_hidden_state, plain, atol=1e-2)
        if model.matcher is not None:
            model.matcher.threshold.fill_(torch.inf)
            assert torch.equal(model(ids, mask, pool)[0].last_hidden_state, plain)
        else:  # no gist key is worth anything beside the zero key, and every query is made to point its way
            pool = pool.map(lambda t: t)
            for i, selector in model.selectors.items():
                selector.zero_key.zero_()
                pool.layers[int(i)].keys.copy_(-1e6 * pool.layers[int(i)].keys.sign())
            empty = model(ids, mask, pool, torch.zeros(1, 3, dtype=torch.bool))[0].last_hidden_state
            torch.testing.assert_close(empty, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_eager_attention_carries_gists_too(tiny: Callable[..., Backbone], kind: str) -> None:
    outs = []
    for implementation in ("sdpa", "eager"):
        backbone = tiny(kind)
        backbone.model.set_attn_implementation(implementation)
        torch.manual_seed(1)
        model = GistModel(backbone, GistConfig()).eval()
        ids, mask = rows(backbone, TEXTS)
        out = model(ids, mask, model.compress(*rows(backbone, EDITS)))[0].last_hidden_state
        outs.append(out[mask.bool()])
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn3"])
def test_attention_without_masks_is_refused(tiny: Callable[..., Backbone], name: str) -> None:
    backbone = tiny()
    backbone.model.config._attn_implementation_internal = name  # the package need not be installed
    with pytest.raises(ValueError, match=rf"backbone\.attention '{name}' takes no mask .* sdpa"):
        GistModel(backbone, GistConfig())


@pytest.mark.parametrize("layers", ["upper", "all"])
def test_active_layers(tiny_gists: Callable[..., GistModel], layers: str) -> None:
    model = tiny_gists(layers=layers, selection="both", match_layer=0.9)
    assert list(model.active) == ([2, 3] if layers == "upper" else [3])
    assert model.match_layer == model.active.start  # the choice must be made before it is used
    assert sorted(model.compress(*rows(model.backbone, EDITS)).layers) == list(model.active)


@pytest.mark.parametrize("selection", ["hidden", "both"])
def test_all_layers_with_hidden_selection_are_those_that_know_the_choice(
    tiny_gists: Callable[..., GistModel], selection: str
) -> None:
    model = tiny_gists(layers="all", selection=selection, match_layer=0.3)
    assert list(model.active) == [1, 2, 3]
    assert model.match_layer == 1


def test_temperature_only_in_eval_and_with_more_than_ten_keys(tiny_gists: Callable[..., GistModel]) -> None:
    model = tiny_gists(selection="qk", temperature=0.45)
    ids, mask = rows(model.backbone, TEXTS)
    nine, ten = (model.compress(*rows(model.backbone, [f"Edit {i}." for i in range(n)])) for n in (9, 10))
    used: list[float] = []
    model.selectors["2"].register_forward_pre_hook(lambda _, args: used.append(args[4]))
    for training, pool in ((False, nine), (False, ten), (True, ten)):
        model.train(training)
        model(ids, mask, pool)
    assert used == [1.0, 0.45, 1.0]  # released code: more than ten keys, the zero-gist's among them


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_gradients(
    tiny_gists: Callable[..., GistModel], kind: str, selection: str
) -> None:
    quiet = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0} if kind == "gpt2" else {}
    found = []
    for on in (False, True):
        torch.manual_seed(3)
        model = tiny_gists(kind, backbone=quiet, selection=selection)
        model.requires_grad_(True).train()
        if on:
            model.language_model.gradient_checkpointing_enable({"use_reentrant": False})
        ids, mask = rows(model.backbone, TEXTS)
        trace: dict[int, Tensor] = {}
        out = model(ids, mask, model.compress(*rows(model.backbone, EDITS)), trace=trace)[0].last_hidden_state
        loss = out[mask.bool()].square().mean() - sum(t[mask.bool()][:, 0].mean() for t in trace.values())
        loss.backward()
        found.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (loss, grads), (again, same) = found
    assert loss == pytest.approx(again, rel=1e-6)
    assert grads.keys() == same.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(same[name], grad, atol=1e-6, rtol=1e-4, msg=name)
