"""Records to tensors: which edit a query should read, which it may see, and where the teacher reads the same tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from marked_words import marked
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from datamodules.tokens import encode
from modules.backbone import Backbone, load_tokenizer
from modules.gist.batch import GistBatch, GistCollator, Kind, QueryConfig
from modules.trained.incomes import block_mask

ONLY: dict[Kind, QueryConfig] = {
    k: QueryConfig(rates={k: 1.0}) for k in ("request", "rephrase", "portability", "locality")
}


@pytest.fixture
def tokenizer(tiny: Callable[..., Backbone]) -> PreTrainedTokenizerBase:
    return tiny().tokenizer


def slots(records: list[EditRecord], pools: list[int] | None = None) -> list[Slot]:
    return [Slot(r, p, 100 + i) for i, (r, p) in enumerate(zip(records, pools or [0] * len(records), strict=True))]


def texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return [tokenizer.decode(row[keep.bool()]) for row, keep in zip(ids, mask, strict=True)]


def test_golden_edits_and_visibility(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    batch = GistCollator(tokenizer, ONLY["rephrase"])(slots(records, [0, 0, 1, 1]))
    assert texts(tokenizer, batch.edits, batch.edits_mask) == [r.request.statement for r in records]
    assert batch.golden.tolist() == [0, 1, 2, 3]
    assert batch.visible.tolist() == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    assert batch.records == [r.id for r in records]
    assert len(batch) == 4
    for row, text in enumerate(texts(tokenizer, batch.queries, batch.queries_mask)):
        choices = [f"{q.prompt} {q.target}" for q in records[row].rephrases]
        assert text in choices
        answer = tokenizer.decode(batch.queries[row][batch.answer[row]])
        assert answer.strip() == f"Land {row}"
    assert not (batch.answer & ~batch.queries_mask.bool()).any()


def test_equal_edits_stand_once_in_a_pool(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    twice = [records[0], records[1], records[0], records[0]]
    batch = GistCollator(tokenizer, ONLY["request"])(slots(twice, [0, 0, 0, 1]))
    assert len(batch.edits) == 3  # A and B of the first pool, A of the second
    assert batch.golden.tolist() == [0, 1, 0, 2]
    assert batch.visible[3].tolist() == [False, False, True]


def test_each_edit_of_a_record_stands_in_the_pool_and_is_asked(
    tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]
) -> None:
    case = replace(records[0], requests=(records[0].request, records[1].request, EditRequest(text="Cee is far.")))
    batch = GistCollator(tokenizer, replace(ONLY["request"], per_record=24))(slots([case, records[2]]))
    edits = texts(tokenizer, batch.edits, batch.edits_mask)
    assert edits == [r.statement for r in (*case.requests, records[2].request)]
    asked = texts(tokenizer, batch.queries, batch.queries_mask)
    for text, golden in zip(asked, batch.golden.tolist(), strict=True):
        assert edits[golden].startswith(text)  # each reads the edit whose prompt it is
    assert set(batch.golden.tolist()[:24]) == {0, 1}  # free text has no prompt of its own
    assert batch.visible.all()


@pytest.mark.parametrize("kind", ["rephrase", "portability"])
def test_of_several_edits_only_their_own_prompts_are_asked(
    tokenizer: PreTrainedTokenizerBase, records: list[EditRecord], kind: Kind
) -> None:
    """A rephrase of the second edit must not be read with the first one before it."""
    first, second = records[:2]
    case = replace(second, requests=(first.request, second.request))
    batch = GistCollator(tokenizer, replace(ONLY[kind], per_record=8))(slots([case]))
    edits = texts(tokenizer, batch.edits, batch.edits_mask)
    asked = texts(tokenizer, batch.queries, batch.queries_mask)
    assert all(edits[at].startswith(text) for text, at in zip(asked, batch.golden.tolist(), strict=True))
    free = EditRecord("made/free", (EditRequest(text="Cee is far."), EditRequest(text="Dee is near.")), case.rephrases)
    assert not GistCollator(tokenizer, ONLY[kind]).fits(free)  # nothing that is known to be about one of them


def test_hops_that_are_not_edited_are_locality(tokenizer: PreTrainedTokenizerBase) -> None:
    """MQuAKE's chain "the capital of where Zoe lives" rests on one hop that the edit does not change."""
    record = EditRecord(
        "case",
        (EditRequest("Zoe lives in", "Japan", "Zoe"),),
        (Query("Where does Zoe live?", ("Japan",)),),
        portability={"single_hop": (Query("Where does Zoe live?", ("Japan",)), Query("Japan's capital?", ("Tokyo",)))},
    )
    rates: dict[Kind, float] = {"portability": 1.0, "locality": 1.0}
    batch = GistCollator(tokenizer, QueryConfig(per_record=20, rates=rates))(slots([record]))
    asked = texts(tokenizer, batch.queries, batch.queries_mask)
    assert set(zip(asked, batch.golden.tolist(), strict=True)) == {
        ("Where does Zoe live? Japan", 0),
        ("Japan's capital? Tokyo", -1),
    }


def test_the_line_break_after_an_edit_is_no_word() -> None:
    """Alone it would have the space that such tokenizers put before a text."""
    found = GistCollator(marked(), QueryConfig()).newline
    assert marked().convert_ids_to_tokens(list(found)) == ["<0x0A>"]


def test_locality_queries_have_no_golden_edit(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    batch = GistCollator(tokenizer, ONLY["locality"])(slots(records))
    assert batch.golden.tolist() == [-1] * 4
    assert texts(tokenizer, batch.queries, batch.queries_mask)[2] == "Village C is in Peru"
    assert batch.teacher_blocks.max() == 2
    assert not (batch.teacher_blocks == 1).any()  # nothing is read with an edit


def test_locality_queries_about_another_edit_are_not_drawn(
    tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]
) -> None:
    near = (Query("City B is in", ("Peru",)), Query("Village A is in", ("Peru",)))
    records[0] = replace(records[0], locality={"near": near})
    draw = GistCollator(tokenizer, QueryConfig(per_record=20, rates={"locality": 1.0}))
    together = set(texts(tokenizer, *_queries(draw(slots(records, [0, 0, 0, 0])), 20)))
    apart = set(texts(tokenizer, *_queries(draw(slots(records, [0, 1, 1, 1])), 20)))
    assert together == {"Village A is in Peru"}
    assert apart == {"Village A is in Peru", "City B is in Peru"}
    # where nothing else is left, the edit itself is asked
    records[0] = replace(records[0], locality={"near": near[:1]})
    batch = draw(slots(records))
    assert batch.golden[:20].tolist() == [0] * 20


def _queries(batch: GistBatch, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.queries[:count], batch.queries_mask[:count]


@pytest.mark.parametrize("bos", [None, False, True])
@pytest.mark.parametrize("selected", ["request", "locality", None])
@torch.no_grad()
def test_teacher_reads_edit_and_query_as_two_plain_passes_would(
    tiny: Callable[..., Backbone], records: list[EditRecord], selected: str | None, bos: bool | None
) -> None:
    backbone = tiny()
    if bos is not None:
        backbone.tokenizer.bos_token = "<|endoftext|>"
        backbone.tokenizer._palimpsest_adds_bos = True
    config = ONLY[selected] if selected else QueryConfig(per_record=3)
    batch = GistCollator(backbone.tokenizer, config, bool(bos))(slots(records, [0, 0, 1, 1]))
    decoder = backbone.model.base_model
    packed = decoder(
        input_ids=batch.teacher,
        attention_mask=block_mask(batch.teacher_blocks, torch.float32),
        position_ids=batch.teacher_positions,
    ).last_hidden_state
    if selected is None:
        assert len({bool(g >= 0) for g in batch.golden}) == 2  # or half is not tested
    for b in range(len(batch)):
        query = batch.queries[b][batch.queries_mask[b].bool()]
        alone = decoder(input_ids=query[None]).last_hidden_state[0]
        start = int(batch.alone[b])
        torch.testing.assert_close(packed[b, start : start + len(query)], alone, atol=1e-5, rtol=1e-5)
        context: list[int] = []
        if batch.golden[b] >= 0:
            edit = batch.edits[batch.golden[b]][batch.edits_mask[batch.golden[b]].bool()]
            context = [*edit.tolist(), *backbone.tokenizer("\n")["input_ids"]]
            query = query[bool(bos) :]  # a BOS stands before the edit, none within the row
        both = decoder(input_ids=torch.tensor([[*context, *query.tolist()]])).last_hidden_state[0, len(context) :]
        start = int(batch.with_edit[b]) + bool(bos and context)
        torch.testing.assert_close(packed[b, start : start + len(query)], both, atol=1e-5, rtol=1e-5)


def test_draws_depend_on_the_slots_seed_alone(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    collator = GistCollator(tokenizer, QueryConfig(per_record=4))
    made = slots(records)
    whole = texts(tokenizer, *_queries(collator(made), 16))
    assert texts(tokenizer, *_queries(collator(made[2:]), 8)) == whole[8:]
    assert texts(tokenizer, *_queries(collator(made[::-1]), 16))[12:] == whole[:4]
    assert texts(tokenizer, *_queries(collator([s._replace(seed=s.seed + 9) for s in made]), 16)) != whole


def test_rates_are_kept(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    batch = GistCollator(tokenizer, QueryConfig(per_record=300, rates={"locality": 0.25, "request": 0.75}))(
        slots(records[:1])
    )
    assert 0.17 < (batch.golden < 0).float().mean() < 0.33


def test_free_text_has_no_stem(tokenizer: PreTrainedTokenizerBase) -> None:
    """Released code: the first half of the text, at most 12 tokens, is not scored."""
    for text, start in (("abcdefgh", 4), ("x" * 40, 12), (" " + "x" * 39, 12)):
        record = EditRecord("free", (EditRequest(text="An abstract."),), rephrases=(Query("", (text,)),))
        batch = GistCollator(tokenizer, ONLY["rephrase"])(slots([record]))
        assert batch.answer[0].int().argmax() == start
        assert batch.answer[0].sum() == len(text) - start


def test_free_text_edit_without_queries(tokenizer: PreTrainedTokenizerBase) -> None:
    """There is nothing to ask: such a record is left out of training, rather than ending it."""
    record = EditRecord("bare", (EditRequest(text="An abstract."),))
    collator = GistCollator(tokenizer, QueryConfig())
    assert not collator.fits(record)
    # one that has queries, but none of a wanted kind, is asked what it has
    asked = replace(record, rephrases=(Query("Title:", ("A",)),))
    batch = GistCollator(tokenizer, ONLY["locality"])(slots([asked]))
    assert texts(tokenizer, batch.queries, batch.queries_mask) == ["Title: A"]


def test_fits_by_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    record = EditRecord("r", (EditRequest("abc", "defg"),), rephrases=(Query("x" * 10, ("y" * 9,)),))
    # one token a byte: "abc defg." is 9, the longer query 20, the newline 1
    for edit, query, expected in ((9, 30, True), (8, 30, False), (9, 29, False)):
        config = QueryConfig(max_edit_tokens=edit, max_query_tokens=query)
        assert GistCollator(tokenizer, config).fits(record) is expected


def test_a_rate_of_zero_leaves_out_such_questions_and_no_record(
    tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]
) -> None:
    """Nor does a question that is too long and never asked."""
    long = {"hop": (Query("Of which land is the flag " + "very " * 60, ("Land 0",)),)}
    plain = [replace(r, rephrases=(), portability=p) for r in records for p in (r.portability, long)]  # as wiki_cf's
    rates: dict[Any, float] = {"request": 0.35, "rephrase": 0.35, "portability": 0.0, "locality": 0.3}
    collator = GistCollator(tokenizer, QueryConfig(per_record=8, rates=rates))
    assert all(map(collator.fits, plain))
    batch = collator(slots(plain))
    asked = texts(tokenizer, batch.queries, batch.queries_mask)
    assert not any("flag" in text for text in asked)
    assert {text.split()[0] for text in asked} == {"City", "Village"}
    # with a rate, or where nothing else can be asked, they are, and have to fit
    for other in (rates | {"portability": 0.1}, {"rephrase": 1.0}, {"locality": 1.0}):
        fits = [GistCollator(tokenizer, QueryConfig(rates=other)).fits(r) for r in plain]
        assert fits == [True, False] * 4


@pytest.mark.parametrize("wanted", [True, False])
def test_bos_of_edits_queries_and_the_teacher(records: list[EditRecord], tiny_config: Any, wanted: bool) -> None:
    """Before an edit it stands as the tokenizer has it; before a query, also where the teacher reads it, if wanted."""
    tokenizer = load_tokenizer(tiny_config())
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer._palimpsest_adds_bos = True
    batch = GistCollator(tokenizer, ONLY["request"], wanted)(slots(records))
    bos = tokenizer.bos_token_id
    assert (batch.edits[:, 0] == bos).all()
    assert (batch.teacher[:, 0] == bos).all()
    assert batch.queries[0].tolist() == list(encode(tokenizer, "City A is in", "Land 0", bos=wanted).ids)
    counts = (batch.queries == bos).sum(1), (batch.teacher == bos).sum(1)  # the teacher's: of the edit, of the query
    assert [c.tolist() for c in counts] == [[int(wanted)] * 4, [1 + int(wanted)] * 4]
    for row, keep in zip(batch.queries, batch.answer, strict=True):
        assert tokenizer.decode(row[keep]).strip().startswith("Land")
    locality = GistCollator(tokenizer, ONLY["locality"], wanted)(slots(records))
    assert torch.equal(locality.teacher, locality.queries)  # out of scope the teacher reads the query alone


def test_free_text_is_scored_from_the_same_token_on_with_a_bos(tiny_config: Any) -> None:
    tokenizer = load_tokenizer(tiny_config())
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer._palimpsest_adds_bos = True
    for text, start in (("abcdefgh", 4), ("abcdefghi", 4), ("x" * 40, 12)):
        record = EditRecord("free", (EditRequest(text="An abstract."),), rephrases=(Query("", (text,)),))
        for bos in (True, False):
            batch = GistCollator(tokenizer, ONLY["rephrase"], bos)(slots([record]))
            assert batch.answer[0].int().argmax() == start + bos
            assert batch.answer[0].sum() == len(text) - start


@pytest.mark.parametrize("rates", [{}, {"request": 0.0}, {"request": -1.0}, {"hops": 1.0}])
def test_rates_are_checked(rates: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"queries\.rates"):
        QueryConfig(rates=rates)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"per_record.*0"):
        QueryConfig(per_record=0)


def test_to_keeps_everything(tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    batch = GistCollator(tokenizer, QueryConfig())(slots(records))
    moved = batch.to(torch.device("cpu"))
    assert all(
        torch.equal(v, getattr(moved, k)) if isinstance(v, torch.Tensor) else v == getattr(moved, k)
        for k, v in vars(batch).items()
    )


def test_block_mask_is_causal_within_blocks() -> None:
    mask = block_mask(torch.tensor([[1, 1, 2, 2, 0]]), torch.float32)[0, 0] == 0
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],  # padding sees itself, so that its softmax is no NaN
    ]


def test_a_closing_text_is_scored_with_the_answer(
    tokenizer: PreTrainedTokenizerBase, records: list[EditRecord]
) -> None:
    one = slots(records[:1])
    plain = GistCollator(tokenizer, QueryConfig(rates={"request": 1.0}))(one)
    closed = GistCollator(tokenizer, QueryConfig(rates={"request": 1.0}, closing="."))(one)
    assert closed.queries[0, -1] == tokenizer(".")["input_ids"][0]
    assert torch.equal(closed.queries[0, :-1], plain.queries[0])
    assert closed.answer.sum() == plain.answer.sum() + 1
