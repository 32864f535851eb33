"""Where selection starts."""

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from datamodules.readers.facts import read_facts
from datamodules.records import EditRecord
from modules.gist.calibration import _ask, _inside, _states, calibrate
from modules.gist.model import GistModel


@pytest.fixture(scope="module")
def facts() -> list[EditRecord]:
    return [r for r, _ in zip(read_facts("train", cities_per_country=3), range(48), strict=False)]


@torch.no_grad()
def right(model: GistModel, facts: list[EditRecord]) -> float:
    """Share of queries that find their edit, or none where they are out of scope."""
    assert model.matcher is not None
    logp, golden = _ask(model.matcher, _states(model, facts), random.Random(0))
    return float((logp.argmax(-1) == golden).float().mean())


def test_without_a_zero_gist_nothing_out_of_scope_is_asked(
    tiny_gists: Callable[..., GistModel], facts: list[EditRecord]
) -> None:
    for zero_gist in (True, False):
        model = tiny_gists(selection="hidden", zero_gist=zero_gist)
        assert model.matcher is not None
        logp, golden = _ask(model.matcher, _states(model, facts[:8]), random.Random(0))
        assert bool((golden == 8).any()) == zero_gist
        assert len(golden) >= 8
        # the choice that does not exist has a log-probability of -1e9, from which nothing can be learned
        assert -logp[torch.arange(len(golden)), golden].min() < 1e3


@pytest.mark.parametrize("selection", ["hidden", "both"])
def test_reproducible_and_leaves_the_rest_alone(
    tiny_gists: Callable[..., GistModel], facts: list[EditRecord], selection: str
) -> None:
    made = []
    for burn in (0, 5):
        model = tiny_gists(selection=selection)
        model.requires_grad_(False)
        assert model.matcher is not None
        model.matcher.map.requires_grad_(True)
        wanted = {n: p.requires_grad for n, p in model.named_parameters()}
        before = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith("matcher.")}
        torch.rand(burn)
        state, python_state = torch.get_rng_state(), random.getstate()
        calibrate(model, facts, seed=1, steps=3, pool=16)
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == python_state
        assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())
        made.append(model.matcher.state_dict())
    assert all(torch.equal(t, made[1][n]) for n, t in made[0].items())


def test_retrieval_improves(tiny_gists: Callable[..., GistModel], facts: list[EditRecord]) -> None:
    model = tiny_gists(selection="hidden")
    calibrate(model, facts, seed=0, steps=0)
    whitened = right(model, facts)
    calibrate(model, facts, seed=0, steps=60)
    # the byte embeddings of a random model say little; to fit its own cases is what can be asked
    assert right(model, facts) > whitened + 0.05


def test_mean_query_starts_at_nothing(tiny_gists: Callable[..., GistModel], facts: list[EditRecord]) -> None:
    model = tiny_gists(selection="qk", zero_key="mean_query")
    before = [s.zero_key.clone() for s in model.selectors.values()]
    others = {n: t.clone() for n, t in model.state_dict().items() if "zero_key" not in n}
    calibrate(model, facts[:8], seed=0)
    for old, selector in zip(before, model.selectors.values(), strict=True):
        assert not torch.allclose(selector.zero_key, old)
        assert selector.zero_key.requires_grad
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in others.items())


def test_both_with_mean_query_sets_the_zero_keys_too(
    tiny_gists: Callable[..., GistModel], facts: list[EditRecord]
) -> None:
    model = tiny_gists(selection="both", zero_key="mean_query")
    before = [s.zero_key.clone() for s in model.selectors.values()]
    calibrate(model, facts[:8], seed=0, steps=1)
    assert not any(torch.equal(s.zero_key, old) for s, old in zip(model.selectors.values(), before, strict=True))


def test_published_start_stays(tiny_gists: Callable[..., GistModel], facts: list[EditRecord]) -> None:
    model = tiny_gists(selection="qk", zero_key="normal")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    calibrate(model, facts[:8], seed=0)
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())


@pytest.mark.parametrize("bos", [True, False])
def test_texts_begin_as_in_training(
    tiny_gists: Callable[..., GistModel], facts: list[EditRecord], monkeypatch: pytest.MonkeyPatch, bos: bool
) -> None:
    """An edit as the tokenizer has it, a query with a BOS if wanted."""
    model = tiny_gists(selection="both", zero_key="mean_query", bos=bos)
    tokenizer = model.backbone.tokenizer
    monkeypatch.setattr(tokenizer, "_palimpsest_adds_bos", True, raising=False)
    tokenizer.bos_token = "<|endoftext|>"
    (case,) = _states(model, facts[:1])
    assert len(case.edit) == 1 + len(tokenizer(facts[0].request.statement).input_ids)
    assert len(case.inside[0]) == bos + len(tokenizer(facts[0].request.prompt).input_ids)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(model, "forward", lambda ids, *_: seen.append(ids) or model.__class__.forward(model, ids, *_))
    calibrate(model, facts[:4], seed=1, steps=1)
    assert bool((seen[0][:, 0] == tokenizer.bos_token_id).all()) == bos


def test_of_several_edits_only_the_first_ones_prompt_is_to_find_it(facts: list[EditRecord]) -> None:
    first, second = facts[:2]
    assert len(_inside(second)) > 1
    assert _inside(replace(second, requests=(first.request, second.request))) == [first.request.prompt]


def test_records_are_needed(tiny_gists: Callable[..., GistModel]) -> None:
    with pytest.raises(ValueError, match="calibration needs training records"):
        calibrate(tiny_gists(selection="hidden"), [], seed=0)
