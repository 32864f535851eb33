"""What is told of selection over pools and queries, against plain calculations."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.tokens import encode
from modules.gist.analysis import in_and_out_of_scope, pools
from modules.gist.analysis_temperature import align, aligned, at_temperature, choices, entropy
from modules.gist.analysis_traces import Trace, by_answer_token, by_place, traces
from modules.gist.editor import GistEdited, encode_edits
from modules.gist.model import GistModel
from modules.gist.pool import GistPool
from modules.gist.selector import HIDDEN

NAMES = ["Aa", "Bb", "Cc", "Dd", "Ee", "Ff", "Gg", "Hh", "Ii", "Jj", "Kk", "Ll"]


@pytest.fixture
def many() -> list[EditRecord]:
    """Twelve records: enough for a pool in which selection has a temperature."""
    return [
        EditRecord(
            id=name,
            requests=(EditRequest(f"City {name} is in", f"Land{i}", f"City {name}"),),
            rephrases=(Query(f"Where is {name}? In", (f"Land{i}",)),),
            locality={"near": (Query(f"Village {name} is in", ("Peru",)),)},
        )
        for i, name in enumerate(NAMES)
    ]


def under(model: GistModel, records: Sequence[EditRecord]) -> GistEdited:
    return GistEdited(model, [], GistPool()).add([r.request for r in records])


# ---------------------------------------------------------------- temperature


def test_entropy_by_hand() -> None:
    even, sure = torch.zeros(1, 4), torch.tensor([[50.0, 0.0, 0.0, HIDDEN]])
    assert entropy(even) == pytest.approx(math.log(4))
    assert entropy(sure) == pytest.approx(0, abs=1e-12)
    assert entropy(torch.cat([even, sure])) == pytest.approx(math.log(4) / 2)
    a = 1.5 / 0.5  # of two, at temperature 0.5
    p = 1 / (1 + math.exp(-a))
    assert entropy(torch.tensor([[1.5, 0.0]]), 0.5) == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p))


def test_logits_that_are_s_times_as_large_need_temperature_s() -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 5)
    for s in (0.2, 1.0, 3.0):
        assert aligned([s * logits], entropy(logits)) == pytest.approx(s, rel=1e-5)
    both = (entropy(logits) + entropy(2 * logits)) / 2
    assert aligned([3 * logits, 6 * logits], both) == pytest.approx(3.0, rel=1e-5)


def test_what_no_temperature_gives_is_none() -> None:
    two = torch.tensor([[1.0, 0.0]])
    assert aligned([two], math.log(3)) is None  # more than two choices can have
    assert aligned([torch.zeros(1, 2)], 0.1) is None  # equal logits stay equal
    assert aligned([two], 0.3) is not None


def plain_choices(model: GistModel, request: EditRequest, gists: GistPool) -> list[Tensor]:
    """All heads' choices at all tokens but the last of one edit, read by itself: by layer [T, H, N + 1]."""
    ids = torch.tensor([encode(model.backbone.tokenizer, request.prompt, request.target, bos=False).ids])
    seen: dict[int, Tensor] = {}

    def keep(layer: int):
        return lambda _, args: seen.update({layer: args[0][0]})  # rotated queries [H, T, D]

    handles = [s.register_forward_pre_hook(keep(int(i))) for i, s in model.selectors.items()]
    trace: dict[int, Tensor] = {}
    model(ids, torch.ones_like(ids), gists, trace=trace)
    for handle in handles:
        handle.remove()
    if not seen:
        return [next(iter(trace.values()))[0, :-1, None].exp()]
    found = []
    for layer, query in seen.items():
        heads, tokens, width = query.shape
        keys = torch.cat([gists.layers[layer].keys, model.selectors[str(layer)].zero_key[None]])  # type: ignore[list-item]
        rows = torch.zeros(tokens - 1, heads, len(keys))
        for t in range(tokens - 1):
            for h in range(heads):
                key = keys[:, h // (heads // keys.shape[1])]
                rows[t, h] = (key @ query[h, t] / math.sqrt(width)).softmax(-1)
        found.append(rows)
    return found


@pytest.mark.parametrize("selection", ["qk", "hidden"])
@torch.no_grad()
def test_choices_are_those_of_every_head_and_token(
    tiny_gists: Callable[..., GistModel], many: list[EditRecord], selection: str
) -> None:
    model = tiny_gists(selection=selection)
    found = choices(under(model, many), many, size=4, texts=6)
    assert len(found) == (1 if selection == "hidden" else 2)
    with at_temperature(model, 1.0):
        plain = []
        for at, record in enumerate(many[:6]):
            pool = many[at // 4 * 4 : at // 4 * 4 + 4]
            plain.append(plain_choices(model, record.request, encode_edits(model, [r.request for r in pool])))
    for layer, expected in zip(found, zip(*plain, strict=True), strict=True):
        rows = torch.cat([e.flatten(0, 1) for e in expected])
        torch.testing.assert_close(layer.softmax(-1), rows, atol=1e-5, rtol=1e-4)


def test_the_answers_tokens_alone(tiny_gists: Callable[..., GistModel], many: list[EditRecord]) -> None:
    edited = under(tiny_gists(selection="hidden"), many)
    whole, answer = (choices(edited, many, 4, 4, tokens)[0] for tokens in ("all", "answer"))  # type: ignore[arg-type]
    at = 0
    for i, record in enumerate(many[:4]):
        row = encode(edited.backbone.tokenizer, record.request.prompt, record.request.target, bos=False)
        count = len(row.ids) - row.target_start  # the token before the answer predicts its first one
        at += len(row.ids) - 1
        torch.testing.assert_close(answer[i * count : (i + 1) * count], whole[at - count : at])
    assert len(answer) == 4 * 6  # " Land0" is six bytes


@pytest.mark.parametrize("selection", ["qk", "hidden", "both"])
def test_alignment(tiny_gists: Callable[..., GistModel], many: list[EditRecord], selection: str) -> None:
    model = tiny_gists(selection=selection)
    model.eval()
    edited = under(model, many)
    done: list[int] = []
    found = align(edited, many, [12, 4], reference=3, texts=12, progress=done.append)
    assert [a.edits for a in found] == [3, 4, 12]
    assert done == [3, 12, 4]
    first, _, last = found
    assert first.temperature == pytest.approx(1, rel=1e-5)
    assert first.entropy_then is None  # a pool of three has no temperature
    assert last.temperature is not None
    assert last.temperature < 1  # more to choose from
    reference = sum(first.entropy) / len(first.entropy)
    logits = choices(edited, many, 12, 12)
    mean = sum(entropy(layer, last.temperature) for layer in logits) / len(logits)
    assert mean == pytest.approx(reference, rel=1e-4)
    for layer, t, wanted in zip(logits, last.temperatures, first.entropy, strict=True):
        assert t is not None
        assert entropy(layer, t) == pytest.approx(wanted, rel=1e-4)
    assert last.entropy_then is not None
    then = sum(last.entropy_then) / len(last.entropy_then)
    # by low-layer states nothing that is read changes the choice; by queries it does, a little
    assert then == pytest.approx(reference, rel=1e-4 if selection == "hidden" else 0.2)
    assert model.config.temperature == 0.45
    with pytest.raises(ValueError, match="a pool of 13 edits cannot be made of 12 records"):
        align(edited, many, [13], reference=1)


def test_the_models_temperature_comes_back(tiny_gists: Callable[..., GistModel]) -> None:
    model = tiny_gists()
    held = at_temperature(model, 2.0)
    held.__enter__()
    assert model.config.temperature == 2.0
    assert not held.__exit__(RuntimeError, RuntimeError("stop"), None)
    assert model.config.temperature == 0.45


# ---------------------------------------------------------------- traces


def trace(values: Sequence[float], answer_from: int, hits: Sequence[bool] | None = None) -> Trace:
    """Two layers, with means as given for the zero-gist, half of it for the golden one, twice for the entropy."""
    row = torch.tensor(values)
    zero = torch.stack([row - 0.1, row + 0.1])
    return Trace(zero, zero / 2, 2 * zero, answer_from, hits)


def test_places_are_counted_from_the_answer() -> None:
    found = by_place([trace([0.1, 0.2, 0.3], 1), trace([0.5, 0.6, 0.7, 0.8], 3), trace([0.9], 0)], share=0.5)
    assert [p.at for p in found] == [-1, 0]  # -3, -2 and 1 are of one query in three
    assert [p.queries for p in found] == [2, 3]
    assert found[0].zero == pytest.approx((0.1 + 0.7) / 2)
    assert found[1].zero == pytest.approx((0.2 + 0.8 + 0.9) / 3)
    assert found[1].golden == pytest.approx(found[1].zero / 2)
    assert found[1].entropy == pytest.approx(found[1].zero * 2)
    assert [p.at for p in by_place([trace([0.1, 0.2, 0.3], 1)])] == [-1, 0, 1]
    assert by_place([]) == []


def test_answers_are_told_token_by_token() -> None:
    found = by_answer_token(
        [
            trace([0.1, 0.2, 0.4], 1, [False, True]),  # the prompt's first token predicts nothing of the answer
            trace([0.6], 0, [True]),
            trace([0.1, 0.8, 0.6, 0.2], 1, [False, True, True]),
            trace([0.9, 0.9], 1),  # not answered
        ],
        most=2,
    )
    assert [(a.token, a.queries) for a in found] == [(1, 3), (2, 2)]
    assert [a.right for a in found] == pytest.approx([1 / 3, 1.0])
    assert [a.golden for a in found] == pytest.approx([(0.1 + 0.3 + 0.4) / 3, (0.2 + 0.3) / 2])
    assert by_answer_token([trace([0.9], 0)]) == []


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_traces_are_those_of_pools_made_by_themselves(
    tiny_gists: Callable[..., GistModel], many: list[EditRecord], selection: str
) -> None:
    model = tiny_gists(selection=selection)
    told: list[int] = []
    found = traces(under(model, many), many, size=5, queries=7, progress=told.append)
    assert told == [5, 2]
    inside, outside = [], []
    for pool, most in ((many[:5], 5), (many[5:10], 2)):
        a, b = in_and_out_of_scope(under(model, pool), pool)
        inside += a[:most]
        outside += b[:most]
    assert len(found.inside) == len(found.outside) == 7
    for got, expected in zip([*found.inside, *found.outside], [*inside, *outside], strict=True):
        torch.testing.assert_close(got.zero, expected.zero, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.of_golden, expected.of_golden, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.entropy, expected.entropy, atol=1e-4, rtol=1e-4)
        assert (got.hits, got.answer_from) == (expected.hits, expected.answer_from)
    assert {s.right for s in found.examples} == {s.right for s in found.inside}
    with pytest.raises(ValueError, match="a pool of 13 edits"):
        traces(under(model, many), many, 13)


def test_of_several_edits_the_first_is_asked_by_its_own_prompt(
    tiny_gists: Callable[..., GistModel], many: list[EditRecord]
) -> None:
    """A rephrase may be another edit's, and the gist that it should select is the first one's."""
    case = replace(many[1], requests=(many[0].request, many[1].request))
    (asked,), _ = in_and_out_of_scope(under(tiny_gists(), many[:2]), [case])
    assert asked.question == f"{many[0].request.prompt} → {many[0].request.target}"
    assert asked.golden == 0


def test_pools_are_cut_not_encoded_again(tiny_gists: Callable[..., GistModel], many: list[EditRecord]) -> None:
    edited = under(tiny_gists(selection="both"), many)
    parts = list(pools(edited, many[::-1], 5))
    assert [len(p.requests) for p in parts] == [5, 5]
    assert parts[0].requests[0] == many[-1].request
    assert torch.equal(parts[1].pool.layers[2].keys[0], edited.pool.layers[2].keys[6])
    assert parts[1].pool.address is not None
    assert edited.pool.address is not None
    assert torch.equal(parts[1].pool.address[4], edited.pool.address[2])
