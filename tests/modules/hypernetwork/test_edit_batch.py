"""What records become in training: edits, and what is asked of each."""

import pickle

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from modules.byte_tokenizer import byte_tokenizer
from modules.hypernetwork.batch import EditBatch, EditCollator, EditQueries, encode_edit

TOKENIZER = byte_tokenizer()


def collate(records: list[EditRecord], pools: list[int] | None = None, **config) -> EditBatch:
    slots = [Slot(r, p, 7 + i) for i, (r, p) in enumerate(zip(records, pools or range(len(records)), strict=True))]
    return EditCollator(TOKENIZER, EditQueries(**config))(slots)


def texts(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
    return [TOKENIZER.decode(row[m.bool()], skip_special_tokens=True) for row, m in zip(ids, mask, strict=True)]


def test_every_record_gives_an_edit_a_rephrase_and_a_neighbour(records: list[EditRecord]) -> None:
    batch = collate(records)
    assert texts(batch.edits, batch.edits_mask) == [f"City {s} is in Land {i}" for i, s in enumerate("ABCD")]
    assert texts(batch.edits, batch.edits_answer) == [f" Land {i}" for i in range(4)]
    asked = texts(batch.queries, batch.queries_mask)
    assert batch.in_scope.tolist() == [True, False] * 4
    assert batch.query_pool.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    for i, record in enumerate(records):
        assert asked[2 * i] in [f"{q.prompt} {q.target}" for q in record.rephrases]
        assert asked[2 * i + 1] == f"Village {'ABCD'[i]} is in Peru"
    assert texts(batch.queries, batch.queries_answer)[:2] == [" Land 0", " Peru"]
    assert batch.records == [r.id for r in records]
    assert batch.visible.sum(1).tolist() == [1] * 8


def test_batch_and_collator_are_sent_between_processes(records: list[EditRecord]) -> None:
    slots = [Slot(r, i, 7 + i) for i, r in enumerate(records)]
    collator = EditCollator(TOKENIZER, EditQueries())
    batch, other = collator(slots), pickle.loads(pickle.dumps(collator))(slots)
    assert torch.equal(batch.queries, pickle.loads(pickle.dumps(other)).queries)


@pytest.mark.parametrize(("rates", "wanted"), [({"request": 1.0}, "is in"), ({"portability": 1.0}, "The flag over")])
def test_the_prompt_itself_or_what_follows_from_it(records: list[EditRecord], rates, wanted: str) -> None:
    batch = collate(records, rates=rates, generality=2, locality=0)
    assert batch.in_scope.all()
    assert len(batch.queries) == 8
    assert all(wanted in text for text in texts(batch.queries, batch.queries_mask))


def test_hops_that_are_not_edited_are_locality() -> None:
    record = EditRecord(
        "case",
        (EditRequest("Zoe lives in", "Japan", "Zoe"),),
        (Query("Where does Zoe live?", ("Japan",)),),
        portability={"single_hop": (Query("Where does Zoe live?", ("Japan",)), Query("Japan's capital?", ("Tokyo",)))},
    )
    batch = collate([record], rates={"portability": 1.0}, generality=8)
    asked = texts(batch.queries, batch.queries_mask)
    assert asked == ["Where does Zoe live? Japan"] * 8 + ["Japan's capital? Tokyo"]
    assert batch.in_scope.tolist() == [True] * 8 + [False]


def test_others_edits_as_locality(records: list[EditRecord]) -> None:
    batch = collate(records, locality_from="others")
    asked = texts(batch.queries, batch.queries_mask)[1::2]
    edits = texts(batch.edits, batch.edits_mask)
    assert all(text in edits and text != edits[i] for i, text in enumerate(asked))


@pytest.mark.parametrize("pools", [[0], [3, 3, 3, 3]])
def test_a_single_pool_has_no_others_and_is_asked_its_own(records: list[EditRecord], pools: list[int]) -> None:
    batch = collate(records[: len(pools)], pools, locality_from="others")
    assert batch.in_scope.tolist() == [True, False] * len(pools)
    asked = texts(batch.queries, batch.queries_mask)[1::2]
    assert asked == [f"Village {s} is in Peru" for s in "ABCD"[: len(pools)]]
    without = EditRecord("w", records[0].requests, records[0].rephrases)
    assert collate([without], locality_from="others").in_scope.tolist() == [True]


def test_pools_and_repeated_edits(records: list[EditRecord]) -> None:
    batch = collate([*records, records[0]], [3, 3, 8, 8, 3])
    assert batch.pools == 2
    assert batch.edit_pool.tolist() == [0, 0, 1, 1]
    assert batch.visible.sum(1).tolist() == [2] * 10
    assert len(batch) == 5


def test_a_query_about_another_edit_of_the_pool_is_not_local(records: list[EditRecord]) -> None:
    near = EditRecord("n", records[0].requests, locality={"near": (Query("The river through City B is", ("Po",)),)})
    alone, together = collate([near, records[1]], [0, 1]), collate([near, records[1]], [0, 0])
    assert "The river through City B is Po" in texts(alone.queries, alone.queries_mask)
    assert "The river through City B is Po" not in texts(together.queries, together.queries_mask)


JAPAN, ASIA = EditRequest("Japan's capital is", "Lima", "Japan"), EditRequest("Peru lies in", "Asia", "Peru")
CASE = EditRecord(
    "case",
    (EditRequest("Zoe lives in", "Japan", "Zoe"), JAPAN),
    rephrases=(Query("Zoe's home?", ("Japan",)), Query("The capital?", ("Lima",))),
    multi_hop=(Query("The capital of Zoe's home:", ("Lima", "Ciudad")),),
)
HOPS = EditRecord(
    "hops",
    (EditRequest("Zoe lives in", "Peru", "Zoe"),),
    locality={"near": (Query("Peru borders on", ("Chad",)), Query("Oslo is in", ("Chad",)))},
    portability={"multi_hop": (Query("Zoe's continent:", ("Asia",), (ASIA,), ("MH",)),)},
)


def test_all_edits_of_a_case_are_made_in_its_pool() -> None:
    batch = collate([CASE, HOPS], rates={"multi_hop": 1.0}, hops=False)
    assert texts(batch.edits, batch.edits_mask) == [
        "Zoe lives in Japan",
        "Japan's capital is Lima",
        "Zoe lives in Peru",
    ]
    assert batch.edit_pool.tolist() == [0, 0, 1]
    assert len(set(batch.edit_seed.tolist())) == 3
    assert texts(batch.queries, batch.queries_mask)[0] == "The capital of Zoe's home: Lima"
    assert batch.visible[0].tolist() == [True, True, False]
    assert len(batch) == 2
    prompts = texts(*_queries(collate([CASE], rates={"request": 1.0}, generality=20)))
    assert set(prompts) == {"Zoe lives in Japan", "Japan's capital is Lima"}


def _queries(batch: EditBatch) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.queries, batch.queries_mask


def test_others_edits_as_locality_are_all_of_theirs() -> None:
    plain = EditRecord("p", (EditRequest("Oslo is in", "Chad", "Oslo"),))
    asked = texts(*_queries(collate([plain, CASE], rates={"request": 1.0}, locality=20, locality_from="others")))
    assert set(asked[1:21]) == {"Zoe lives in Japan", "Japan's capital is Lima"}


def test_related_hops_are_edited_into_the_pool_of_their_query() -> None:
    batch = collate([HOPS, CASE], rates={"portability": 1.0})
    assert texts(batch.edits, batch.edits_mask)[:2] == ["Zoe lives in Peru", "Peru lies in Asia"]
    assert batch.edit_pool.tolist() == [0, 0, 1, 1]
    asked = texts(*_queries(batch))
    assert asked[0] == "Zoe's continent: Asia"
    assert asked[1] == "Oslo is in Chad"  # a hop's subject is not to be left alone
    # only for a query that rests on them, and only if wanted
    assert len(collate([HOPS], rates={"request": 1.0}).edits) == 1
    assert len(collate([HOPS], rates={"portability": 1.0}, hops=False).edits) == 1
    local = set(texts(*_queries(collate([HOPS], rates={"request": 1.0}, locality=20)))[1:])
    assert local == {"Peru borders on Chad", "Oslo is in Chad"}


def test_a_query_is_not_asked_where_another_record_edits_its_hop() -> None:
    other = EditRecord("o", (EditRequest("Peru lies in", "Oceania", "Peru"),))
    apart = collate([HOPS, other], [0, 1], rates={"portability": 1.0})
    together = collate([HOPS, other], [0, 0], rates={"portability": 1.0})
    assert "Zoe's continent: Asia" in texts(*_queries(apart))
    assert "Zoe's continent: Asia" not in texts(*_queries(together))
    assert texts(*_queries(together))[0] == "Zoe lives in Peru"
    assert len(together.edits) == 2


def test_a_slots_queries_and_edits_depend_on_its_seed_and_pool_alone() -> None:
    drawn = {"request": 1.0, "portability": 1.0, "multi_hop": 1.0}
    whole = collate([HOPS, CASE, HOPS], rates=drawn, generality=3)
    slots = [Slot(HOPS, 0, 7), Slot(CASE, 1, 8), Slot(HOPS, 2, 9)]
    for i in range(3):
        alone = EditCollator(TOKENIZER, EditQueries(rates=drawn, generality=3))(slots[i : i + 1])
        mine, edits = whole.query_pool == i, whole.edit_pool == i
        assert texts(*_queries(alone)) == texts(whole.queries[mine], whole.queries_mask[mine])
        assert texts(alone.edits, alone.edits_mask) == texts(whole.edits[edits], whole.edits_mask[edits])
        assert alone.edit_seed.tolist() == whole.edit_seed[edits].tolist()


def test_what_fits_counts_every_edit_and_hop() -> None:
    def fits(record: EditRecord, **config) -> bool:
        return EditCollator(TOKENIZER, EditQueries(**config)).fits(record)

    assert fits(HOPS, max_edit_tokens=17)
    assert fits(CASE, max_edit_tokens=23)
    assert not fits(CASE, max_edit_tokens=22)  # its second edit
    long = EditRecord("l", HOPS.requests, portability={"h": (Query("q", ("a",), (EditRequest("x" * 30, "y"),)),)})
    assert not fits(long, max_edit_tokens=20)
    assert fits(long, max_edit_tokens=20, hops=False)


def test_free_text_is_predicted_from_its_middle() -> None:
    edit = encode_edit(TOKENIZER, EditRequest(text="Peru"))
    assert edit.start == 2 == len(edit.ids) - 2
    long = encode_edit(TOKENIZER, EditRequest(text="The capital of Norway is Lima."))
    assert long.start == 12


def test_what_fits(records: list[EditRecord]) -> None:
    def fits(record: EditRecord, **config: int) -> bool:
        return EditCollator(TOKENIZER, EditQueries(**config)).fits(record)

    assert fits(records[0])
    assert not fits(records[0], max_edit_tokens=10)
    assert not fits(records[0], max_query_tokens=20)
    assert not fits(EditRecord("x", (EditRequest(text="A"),), rephrases=records[0].rephrases))
    assert not fits(EditRecord("x", (EditRequest(text="A statement."),)))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rates": {"locality": 1.0}}, "rates"),
        ({"rates": {"rephrase": -1.0}}, "rates"),
        ({"rates": {}}, "rates"),
        ({"generality": 0}, "generality"),
        ({"locality": -1}, "locality"),
    ],
)
def test_wrong_settings_are_named(config, named: str) -> None:
    with pytest.raises(ValueError, match=rf"queries\.{named}" if named != "locality" else named):
        EditQueries(**config)
