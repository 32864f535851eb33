"""Low-rank terms against weights that are really written, and what is left of them afterwards: nothing."""

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from modules.backbone import Backbone
from modules.interventions import Deltas, LowRank, checkpointed, hooked, linear, low_rank, merge, shape

KINDS = ["llama", "qwen3", "gpt2", "gpt_neox", "gptj"]
IDS = torch.arange(36).reshape(3, 12) + 5


def names_of(backbone: Backbone) -> list[str]:
    return [f"{backbone.parts.layers}.{i}.{name}" for i in (1, 2) for name in backbone.parts.mlp]


def terms_of(backbone: Backbone, rows: int, rank: int = 3, scale: float = 0.1) -> dict[str, LowRank]:
    draw = torch.Generator().manual_seed(1)

    def random(width: int) -> Tensor:
        return scale * torch.randn(rows, rank, width, generator=draw)

    return {n: LowRank(*(random(d) for d in shape(backbone.model, n))) for n in names_of(backbone)}


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_term_is_the_written_weight(tiny: Callable[..., Backbone], kind: str) -> None:
    """For one term shared by all rows, and for a term of each row; in float64."""
    backbone = tiny(kind)
    model = backbone.model.double()
    before = model(IDS).logits
    terms = {n: LowRank(t.a.double(), t.b.double()) for n, t in terms_of(backbone, 3).items()}
    with low_rank(model, terms):
        together = model(IDS).logits
    for i in range(3):
        own = {n: t[torch.tensor([i])] for n, t in terms.items()}
        with low_rank(model, own):
            shared = model(IDS).logits
        written = copy.deepcopy(model)
        merge(written, own)
        expected = written(IDS).logits
        torch.testing.assert_close(shared, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together[i], expected[i], rtol=1e-9, atol=1e-9)
        assert (expected[i] - before[i]).abs().max() > 1e-3
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_32_edits_in_one_batch_are_32_edits_one_by_one(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    terms = terms_of(backbone, 32)
    ids = torch.randint(3, 200, (32, 10), generator=torch.Generator().manual_seed(0))
    with low_rank(backbone.model, terms):
        together = backbone.model(ids).logits
    for i in range(32):
        with low_rank(backbone.model, {n: t[torch.tensor([i])] for n, t in terms.items()}):
            alone = backbone.model(ids[i : i + 1]).logits
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_nested_terms_add_up(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    terms = terms_of(backbone, 1)
    twice = {n: LowRank(t.a, 2 * t.b) for n, t in terms.items()}
    with low_rank(backbone.model, twice):
        expected = backbone.model(IDS).logits
    with low_rank(backbone.model, terms), low_rank(backbone.model, terms):
        torch.testing.assert_close(backbone.model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_is_left_also_after_an_exception(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    before, answers = state(backbone.model), backbone.model(IDS).logits
    with pytest.raises(RuntimeError, match="inside"), low_rank(backbone.model, terms_of(backbone, 1)):  # noqa: PT012
        assert not torch.equal(backbone.model(IDS).logits, answers)
        raise RuntimeError("inside")
    assert torch.equal(backbone.model(IDS).logits, answers)
    assert all(torch.equal(a, b) for a, b in zip(before, state(backbone.model), strict=True))
    assert not any(m._forward_hooks for m in backbone.model.modules())


def test_wrong_names_and_rows_are_named(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    terms = terms_of(backbone, 2)
    for name in ("model.layers.9.mlp.up_proj", "model.norm"):
        with (
            pytest.raises(ValueError, match=name),
            low_rank(backbone.model, terms | {name: terms[names_of(backbone)[0]]}),
        ):
            pass
    assert not any(m._forward_hooks for m in backbone.model.modules())
    with pytest.raises(ValueError, match="2 rows met a batch of 3"), low_rank(backbone.model, terms):
        backbone.model(IDS)
    with pytest.raises(ValueError, match="add them up"):
        merge(backbone.model, terms)


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_are_run_again_see_the_same_terms(tiny: Callable[..., Backbone], kind: str, inside: bool) -> None:
    """Under gradient checkpointing the backward pass comes after the `with`, or while other terms are on."""
    backbone = tiny(kind)
    found: list[list[Tensor]] = []
    for checkpointing in (False, True):
        terms = {n: LowRank(t.a.requires_grad_(), t.b.requires_grad_()) for n, t in terms_of(backbone, 3).items()}
        with low_rank(backbone.model, terms), checkpointed(backbone.model) if checkpointing else nullcontext():
            loss = backbone.model(IDS, use_cache=False).logits.square().mean()
            assert backbone.model.is_gradient_checkpointing is checkpointing
        if inside:
            others = terms_of(backbone, 1)
            with low_rank(backbone.model, others):
                loss.backward()
                with torch.no_grad():
                    changed = backbone.model(IDS, use_cache=False).logits
            with torch.no_grad():
                assert not torch.equal(backbone.model(IDS, use_cache=False).logits, changed)
        else:
            loss.backward()
        found.append([t.a.grad for t in terms.values()] + [t.b.grad for t in terms.values()])
    assert not backbone.model.is_gradient_checkpointing
    assert not any(m.training for m in backbone.model.modules())
    assert not any(m._forward_hooks for m in backbone.model.modules())
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, rtol=1e-5, atol=1e-9)


@torch.no_grad()
def test_bf16_backbone_with_fp32_factors(tiny: Callable[..., Backbone]) -> None:
    """The term is computed in fp32 and the sum rounded once; also where autocast is on."""
    backbone = tiny()
    model = backbone.model.bfloat16()
    (name, term), *_ = terms_of(backbone, 1).items()
    seen: list[tuple[Tensor, Tensor]] = []
    layer = linear(model, name)
    with low_rank(model, {name: term}), hooked(model, {name: lambda _, x, out: seen.append((x[0], out))}):
        model(IDS)
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS)
    for x, out in seen:
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, (layer(x) + x.float() @ term.a[0].T @ term.b[0]).bfloat16())


@pytest.mark.parametrize(("d_in", "d_out"), [(5, 7), (7, 5)])
def test_compact_terms(d_in: int, d_out: int) -> None:
    term = LowRank(torch.randn(2, 20, d_in), torch.randn(2, 20, d_out))
    small = term.compact()
    assert small.a.shape == (2, 5, d_in)
    assert small.b.shape == (2, 5, d_out)
    x = torch.randn(2, 3, d_in)
    torch.testing.assert_close(small(x), term(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # a change of weights is never rounded
        assert torch.equal(term.compact()(x), small(x))
    few = LowRank(term.a[:, :4], term.b[:, :4])
    assert few.compact() is few


def test_deltas_become_terms() -> None:
    """Tokens of three edits in any order; the second has none; edits of one row add up."""
    edit = torch.tensor([2, 0, 2, 0, 2])
    deltas = Deltas(torch.randn(5, 4), torch.randn(5, 6), edit)

    def weight(*edits: int) -> Tensor:
        rows = [i for i, e in enumerate(edit.tolist()) if e in edits]
        return deltas.a[rows].T @ deltas.b[rows]

    found = deltas.term(3).weight()
    torch.testing.assert_close(found, torch.stack([weight(0), weight(), weight(2)]))
    pooled = deltas.term(2, torch.tensor([1, 0, 1])).weight()
    torch.testing.assert_close(pooled, torch.stack([weight(1), weight(0, 2)]))
    kept = deltas.keep(torch.tensor([2, 1]))
    torch.testing.assert_close(kept.term(2).weight(), torch.stack([weight(2), weight()]))
    more = deltas.then(kept, 3).term(5).weight()
    torch.testing.assert_close(more, torch.stack([weight(0), weight(), weight(2), weight(2), weight()]))
    nothing = Deltas(torch.zeros(0, 4), torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    assert not nothing.term(2).weight().any()
    assert nothing.keep(torch.tensor([0])).term(1).weight().shape == (1, 4, 6)
