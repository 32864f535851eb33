"""What is asked of hand-made records, and as which tokens."""

import pytest
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig, load_tokenizer
from modules.distill.queries import DistillCollator, DistillQueries, Question, questions_of
from modules.gist.batch import queries_by_kind
from trainers.callbacks.throughput import count

REQUEST = EditRequest("Bo works for", "Boeing", "Bo", old_target="Peugeot")
RECORD = EditRecord(
    "made/Bo",
    (REQUEST,),
    rephrases=(Query("Bo is paid by", ("Boeing",)), Query("Who pays Bo?", ("Boeing",))),
    locality={
        "near": (Query("Al works for", ("Peugeot",)), Query("Cy works for", ("Peugeot",))),
        "far": (Query("1 +", ("1",)),),
    },
    portability={"hop": (Query("Bo's firm builds", ("planes",)),)},
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(BackboneConfig("random:llama"))


def test_prompts_in_scope_with_both_answers_and_two_neighbours() -> None:
    """As released: request and rephrases, then two neighbours, each with the new and the old target."""
    both = ("Boeing", "Peugeot")
    mine = [Question(p, t) for p in ("Bo works for", "Bo is paid by", "Who pays Bo?") for t in both]
    near = [Question(p, t) for p in ("Al works for", "Cy works for") for t in both[::-1]]
    assert questions_of(RECORD, DistillQueries()) == mine + near


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (DistillQueries(both_targets=False), 5),
        (DistillQueries(rephrases=0), 6),
        (DistillQueries(rephrases=1, locality=0), 4),
        (DistillQueries(locality=9), 12),
    ],
)
def test_switches(config: DistillQueries, count: int) -> None:
    assert len(questions_of(RECORD, config)) == count


def test_without_an_old_target_there_is_one_answer_in_scope() -> None:
    """As of zsRE, whose neighbour has an answer of its own."""
    near = Query("nq: who?", ("Ed",))
    record = EditRecord("z", (EditRequest("Who made it?", "Ann", "it"),), locality={"loc": (near,)})
    expected = [("Who made it?", "Ann"), ("nq: who?", "Ed"), ("nq: who?", "Ann")]
    assert questions_of(record, DistillQueries()) == expected


def test_of_several_edits_it_is_not_said_which_one_a_rephrase_is_of() -> None:
    other = EditRequest("Al works for", "Fiat", "Al", old_target="Seat")
    record = EditRecord("m", (REQUEST, other), rephrases=(Query("Both work", ("here",)),))
    assert [q.target for q in questions_of(record, DistillQueries())] == ["Boeing", "Peugeot", "Fiat", "Seat", "here"]


def test_batch(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = DistillCollator(tokenizer, DistillQueries(locality=1))
    short = EditRecord("s", (REQUEST,))
    batch = collate([Slot(RECORD, 0, 1), Slot(short, 0, 2)])
    assert batch.records == ["made/Bo", "s"]
    assert len(batch) == 2
    asked = [questions_of(r, collate.config) for r in (RECORD, short)]
    own = zip(batch.record.tolist(), batch.asked, strict=True)
    assert sorted(own) == [(i, q) for i, of in enumerate(asked) for q in sorted(of)]
    for i, question in enumerate(batch.asked):
        answer = tokenizer.decode(batch.queries[i][batch.queries_answer[i]])
        assert answer.strip() == question.target
        whole = tokenizer.decode(batch.queries[i][batch.queries_mask[i].bool()], skip_special_tokens=True)
        assert whole == f"{question.prompt} {question.target}"


def test_questions_of_like_length_go_together(tokenizer: PreTrainedTokenizerBase) -> None:
    """As many passes as asked for, whatever the lengths are, and no more than records; each holds its rows whole."""
    long = EditRecord("long", (EditRequest("Where, if that may be asked at all, does Bo work?", "Fiat", "Bo"),))
    slots = [Slot(RECORD, 0, 1), Slot(long, 0, 2), Slot(RECORD, 0, 3)]
    for wanted, passes in ((1, 1), (2, 2), (4, 3)):
        batch = DistillCollator(tokenizer, DistillQueries(passes=wanted))(slots)
        lengths = batch.queries_mask.sum(1).tolist()
        assert lengths == sorted(lengths)
        assert len(batch.passes) == passes
        assert [i for a, b, _ in batch.passes for i in range(a, b)] == list(range(len(lengths)))
        assert all(width == max(lengths[a:b]) for a, b, width in batch.passes)
        tokens, queries, padding, positions = count(batch).tolist()
        assert (tokens, queries, padding) == (sum(lengths), 3, positions - tokens)
        assert positions == sum((b - a) * max(lengths[a:b]) for a, b, _ in batch.passes)
        assert (positions < batch.queries.numel()) == (passes > 1)


def test_draws_hang_on_the_slot_alone(tokenizer: PreTrainedTokenizerBase) -> None:
    collate = DistillCollator(tokenizer, DistillQueries(per_record=3))
    one = collate([Slot(RECORD, 0, 5), Slot(RECORD, 0, 6)])
    two = collate([Slot(RECORD, 3, 6)])
    of = [{q for q, i in zip(one.asked, one.record.tolist(), strict=True) if i == record} for record in (0, 1)]
    assert (len(one.asked), len(of[0])) == (6, 3)
    assert of[1] == set(two.asked) != of[0]


def test_what_cannot_be_trained_on_does_not_fit(tokenizer: PreTrainedTokenizerBase) -> None:
    assert DistillCollator(tokenizer, DistillQueries()).fits(RECORD)
    longest = max(len(f"{q.prompt} {q.target}") for q in questions_of(RECORD, DistillQueries()))
    assert not DistillCollator(tokenizer, DistillQueries(max_query_tokens=longest - 1)).fits(RECORD)
    assert not DistillCollator(tokenizer, DistillQueries()).fits(EditRecord("t", (EditRequest(text="Bo is here."),)))
    assert queries_by_kind(RECORD)["portability"]  # which is not distilled


@pytest.mark.parametrize("wrong", [{"per_record": 0}, {"passes": 0}, {"locality": -1}, {"rephrases": -1}])
def test_settings_are_checked(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"queries\.rephrases"):
        DistillQueries(**wrong)
