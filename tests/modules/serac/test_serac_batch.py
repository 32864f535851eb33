"""Batches: which pairs there are and what they weigh, readings, and hard negatives."""

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from modules.byte_tokenizer import byte_tokenizer
from modules.gist.batch import Kind
from modules.serac.batch import SeracBatch, SeracCollator, SeracQueries
from modules.serac.encoder import EncoderConfig, TextEncoder
from modules.serac.negatives import HardConfig, HardNegatives
from modules.serac.scope import ScopeConfig


@pytest.fixture
def collate(scope_config: Callable[..., ScopeConfig]) -> Callable[..., SeracBatch]:
    def make(slots: list[Slot], hard: HardNegatives | None = None, mixture: bool = False, **options: Any) -> SeracBatch:
        return SeracCollator(byte_tokenizer(), scope_config(), SeracQueries(**options), hard, mixture)(slots)

    return make


def slots(records: list[EditRecord], pools: list[int]) -> list[Slot]:
    return [Slot(r, pool, 100 + i) for i, (r, pool) in enumerate(zip(records, pools, strict=True))]


def text(ids: torch.Tensor, mask: torch.Tensor) -> str:
    return str(byte_tokenizer().decode(ids[mask.bool()]))


def test_a_record_is_told_apart_from_its_own_negatives(
    records: list[EditRecord], collate: Callable[..., SeracBatch]
) -> None:
    batch = collate(slots(records, [0, 0, 1, 1]), positives=2, negatives=1)
    assert batch.positive.shape == batch.negative.shape == (12, 4)
    assert torch.equal(batch.positive.sum(0), torch.ones(4))
    assert torch.equal(batch.negative.sum(0), torch.ones(4))
    for q in range(12):
        record = records[q // 3]
        own = torch.zeros(4)
        own[q // 3] = 1.0 if q % 3 == 2 else 0.5
        asked = text(batch.queries[q], batch.queries_mask[q])
        inside = [record.request.prompt, *(r.prompt for r in record.rephrases)]
        assert asked in (["Village " + record.id[-1] + " is in"] if q % 3 == 2 else inside)
        assert torch.equal((batch.negative if q % 3 == 2 else batch.positive)[q], own)
    assert [text(*row) for row in zip(batch.edits, batch.edits_mask, strict=True)] == [
        r.request.prompt for r in records
    ]


def test_queries_of_the_pools_others_are_half_of_the_negatives(
    records: list[EditRecord], collate: Callable[..., SeracBatch]
) -> None:
    batch = collate(slots(records, [0, 0, 0, 1]), pairs="pool")
    expected = torch.zeros(8, 4)
    for edit, others in {0: (1, 2), 1: (0, 2), 2: (0, 1)}.items():
        expected[2 * edit + 1, edit] = 0.5
        for other in others:
            expected[2 * other : 2 * other + 2, edit] = 0.125
    expected[7, 3] = 1.0  # alone in its pool
    torch.testing.assert_close(batch.negative, expected)


def test_what_may_be_in_scope_of_another_edit_is_no_negative(
    records: list[EditRecord], collate: Callable[..., SeracBatch]
) -> None:
    about_a = EditRecord(
        "made/again",
        (EditRequest("The mayor of City A is", "Ann", "City A"),),
        locality={"near": (Query("City B is near", ("City C",)),)},
    )
    same = EditRecord("made/same", (EditRequest("City C is in", "Land 9", "City C"),))
    batch = collate(slots([records[0], records[1], records[2], about_a, same], [0] * 5), pairs="pool")
    asked = [text(*row) for row in zip(batch.queries, batch.queries_mask, strict=True)]
    names = {"City A": (0, 3), "City B": (1,), "City C": (2, 4)}
    for q, prompt in enumerate(asked):
        for name, edits in names.items():
            if name in prompt and not batch.positive[q].any():
                own = 3 if prompt == "City B is near" else None
                assert all(batch.negative[q, e] == 0 for e in edits if e != own)
    assert batch.negative[-1, 2] == 0  # the same prompt
    assert batch.negative[:, 4].sum() == 1  # which has no negative of its own


def test_the_draw_depends_on_the_record_alone(records: list[EditRecord], collate: Callable[..., SeracBatch]) -> None:
    whole = collate(slots(records, [0, 1, 2, 3]))
    for i, slot in enumerate(slots(records, [0, 1, 2, 3])):
        alone = collate([slot])
        for q in range(2):
            one = text(alone.queries[q], alone.queries_mask[q])
            assert one == text(whole.queries[2 * i + q], whole.queries_mask[2 * i + q])


def test_readings_begin_with_the_statement(records: list[EditRecord], collate: Callable[..., SeracBatch]) -> None:
    batch = collate(slots(records, [0, 1, 2, 3]), mixture=True, rates={"portability": 1.0})
    assert batch.in_scope.tolist() == [True, False] * 4
    assert batch.share.tolist() == [1.0] * 8
    assert batch.own.tolist() == [[q, q // 2] for q in range(8)]
    asked = f"The flag over City C is that of Land {2}"
    assert text(batch.readings[4], batch.readings_mask[4]) == f"City C is in Land 2. {asked}"
    assert text(batch.plain[4], batch.plain_mask[4]) == asked
    for ids, answer in ((batch.readings, batch.readings_answer), (batch.plain, batch.plain_answer)):
        assert text(ids[4], answer[4]) == " Land 2"
        assert text(ids[5], answer[5]) == " Peru"


@pytest.mark.parametrize("kind", ["rephrase", "portability"])
def test_of_several_edits_the_first_is_asked_by_its_own_prompt(
    records: list[EditRecord], collate: Callable[..., SeracBatch], kind: Kind
) -> None:
    """A rephrase may be another edit's, which the first one's statement does not answer."""
    first, second = records[:2]
    case = replace(second, requests=(first.request, second.request))
    batch = collate(slots([case], [0]), positives=8, rates={kind: 1.0})
    inside = batch.positive.sum(1) > 0
    asked = [text(*row) for row in zip(batch.queries[inside], batch.queries_mask[inside], strict=True)]
    assert asked == [first.request.prompt] * 8


def test_hops_that_are_not_edited_are_out_of_scope(collate: Callable[..., SeracBatch]) -> None:
    record = EditRecord(
        "case",
        (EditRequest("Zoe lives in", "Japan", "Zoe"),),
        (Query("Where does Zoe live?", ("Japan",)),),
        portability={"single_hop": (Query("Where does Zoe live?", ("Japan",)), Query("Japan's capital?", ("Tokyo",)))},
    )
    batch = collate(slots([record], [0]), positives=8, rates={"portability": 1.0})
    inside = batch.positive.sum(1) > 0
    asked = [text(*row) for row in zip(batch.queries, batch.queries_mask, strict=True)]
    told = set(zip(asked, inside.tolist(), strict=True))
    assert told == {("Where does Zoe live?", True), ("Japan's capital?", False)}


def test_an_answer_without_a_prompt_is_scored_where_both_models_have_its_tokens(
    collate: Callable[..., SeracBatch],
) -> None:
    record = EditRecord(
        "made/text", (EditRequest(text="Lyon is a Japanese city."),), (Query("", ("Lyon lies in Japan",)),)
    )
    batch = collate(slots([record], [0]), mixture=True)
    assert text(batch.readings[0], batch.readings_mask[0]) == "Lyon is a Japanese city. Lyon lies in Japan"
    assert batch.readings_answer.sum() == batch.plain_answer.sum() == len("Lyon lies in Japan") // 2
    assert batch.negative.sum() == 0
    assert text(batch.edits[0], batch.edits_mask[0]) == "Lyon is a Japanese city."


def test_what_fits(records: list[EditRecord], scope_config: Callable[..., ScopeConfig]) -> None:
    def fits(record: EditRecord, **limits: Any) -> bool:
        return SeracCollator(byte_tokenizer(), scope_config(), SeracQueries(**limits)).fits(record)

    record = records[0]
    longest = len("The flag over City A is that of Land 0")
    assert fits(record, max_query_tokens=longest)
    assert not fits(record, max_query_tokens=longest - 1)
    assert fits(record, max_edit_tokens=len("City A is in Land 0."))
    assert not fits(record, max_edit_tokens=len("City A is in Land 0"))
    assert not fits(EditRecord("made/statement", (EditRequest(text="Nothing is asked of this."),)))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"rates": {"locality": 1.0}}, "queries.rates"),
        ({"rates": {"request": 0.0}}, "queries.rates"),
        ({"negatives": 0}, "queries.positives and negatives"),
    ],
)
def test_settings_are_checked(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SeracQueries(**options)


# ---------------------------------------------------------------------- hard negatives


def asking(*questions: str) -> list[EditRecord]:
    return [
        EditRecord(f"made/{i}", (EditRequest("p", "t"),), locality={"near": (Query(q, ("a",)),)})
        for i, q in enumerate(questions)
    ]


def mined(config: Callable[..., EncoderConfig], questions: list[str], **options: Any) -> HardNegatives:
    hard = HardConfig(encoder=config(), **options)
    return HardNegatives(hard, TextEncoder(hard.encoder), asking(*questions))


def test_hard_negatives_are_neighbours_but_for_the_nearest(encoder_config: Callable[..., EncoderConfig]) -> None:
    questions = [f"Is {word} a city?" for word in ("Lyon", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Accra", "Bern")]
    hard = mined(encoder_config, questions, first=2, last=5, temperature=0.05)
    edit = asking("none")[0]
    vectors = torch.nn.functional.normalize(hard.encoder.embed([*questions, "Is Nice a city?"]), dim=-1)
    near = vectors[:-1] @ vectors[-1]
    order = near.argsort(descending=True)[2:5]
    drawn = [hard.draw(edit, "Is Nice a city?", random.Random(i)) for i in range(2000)]
    shares = torch.tensor([sum(q.prompt == questions[i] for q in drawn if q) / 2000 for i in order])
    assert shares.sum() == 1
    torch.testing.assert_close(shares, (near[order] / 0.05).softmax(0), atol=0.04, rtol=0)


def test_no_hard_negative_is_in_scope(encoder_config: Callable[..., EncoderConfig]) -> None:
    hard = mined(encoder_config, ["Lyon is in", "Where is Lyon?", "Lyon's land is", "Rome is in"], first=0, last=4)
    named = EditRecord("made/x", (EditRequest("Lyon is in", "Japan", "Lyon"),))
    assert {q.prompt for i in range(50) if (q := hard.draw(named, "Lyon is in", random.Random(i)))} == {"Rome is in"}
    unnamed = EditRecord("made/x", (EditRequest("Lyon is in", "Japan"),), (Query("Where is Lyon?", ("Japan",)),))
    drawn = {q.prompt for i in range(50) if (q := hard.draw(unnamed, "Lyon is in", random.Random(i)))}
    assert drawn == {"Lyon's land is", "Rome is in"}
    only = mined(encoder_config, ["Lyon is in"], first=0, last=4)
    assert only.draw(named, "Lyon is in", random.Random(0)) is None


def test_hard_negatives_stand_in_at_their_rate(
    records: list[EditRecord], collate: Callable[..., SeracBatch], encoder_config: Callable[..., EncoderConfig]
) -> None:
    hard = mined(encoder_config, ["Who rules Rome?", "Who rules Oslo?"], first=0, last=2, rate=0.25)
    many = [Slot(records[0], i, i) for i in range(400)]
    batch = collate(many, hard, mixture=True)
    share = sum(text(*row).startswith("Who") for row in zip(batch.queries, batch.queries_mask, strict=True)) / 400
    assert share == pytest.approx(0.25, abs=0.06)
    without = EditRecord("made/none", (EditRequest("City Z is in", "Peru", "City Z"),))
    assert text(*(t[1] for t in (collate([Slot(without, 0, 1)], hard).queries, torch.ones(2, 15)))).startswith("Who")


def test_too_few_questions_are_named(encoder_config: Callable[..., EncoderConfig]) -> None:
    with pytest.raises(ValueError, match=r"2 locality questions.*queries\.hard\.first"):
        mined(encoder_config, ["a?", "b?", "a?"], first=2, last=5)
    with pytest.raises(ValueError, match=r"first must be below last"):
        HardConfig(first=5, last=5)
    with pytest.raises(ValueError, match=r"rate must be between"):
        HardConfig(rate=1.5)
