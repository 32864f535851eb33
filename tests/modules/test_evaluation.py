"""Evaluation with scripted models: what they answer is written down, so every figure is known."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from datamodules.readers.mquake import HOP
from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.editor import Edited, Editor, TargetScore
from modules.evaluation import (
    Answers,
    TokenAccuracy,
    evaluate,
    evaluate_pool,
    fewer_queries,
    split_pools,
    without_collisions,
)
from modules.judging import conflicting_edits, evaluate_pools
from modules.training_free.icl import InContext, RightEdit, Unedited

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu")))


class Scripted(Edited):
    """Answers what it is told, one token a letter; what it is not told it answers with '?'."""

    def __init__(self, says: dict[str, str]) -> None:
        self.says, self.context = says, ""
        self.scored: list[list[tuple[str, str]]] = []
        self.generated: list[list[str]] = []
        self.batch_sizes: set[int] = set()

    def score(self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32) -> list[TargetScore]:
        self.scored.append(list(zip(prompts, targets, strict=True)))
        self.batch_sizes.add(batch_size)
        scores = []
        for prompt, target in zip(prompts, targets, strict=True):
            said = self.says.get(prompt, "").ljust(len(target), "?")[: len(target)]
            predicted, wanted = (torch.tensor([ord(c) for c in text]) for text in (said, target))
            scores.append(TargetScore(torch.zeros(len(target)), predicted, wanted))
        return scores

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        self.generated.append(list(prompts))
        return [self.says.get(prompt, "?")[:max_new_tokens] for prompt in prompts]


class Taught(Editor):
    """Answers each edit's own prompt, and nothing else; while it edits, the original answers wrongly."""

    name = "taught"

    def __init__(self, original: Scripted | None = None) -> None:
        self.original = original
        self.pools: list[list[str]] = []
        self.models: list[Scripted] = []

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        self.pools.append([r.prompt for r in requests])
        self.models.append(Scripted({r.prompt: r.target for r in requests}))
        said = self.original.says if self.original else {}
        if self.original:
            self.original.says = {}
        yield self.models[-1]
        if self.original:
            self.original.says = said


class TaughtOwn(Taught):
    name = "taught_own"
    own_edit_only = True


def query(prompt: str, *answers: str) -> Query:
    return Query(prompt, answers)


def city(name: str, **fields: Any) -> EditRecord:
    return EditRecord(name, (EditRequest(f"{name} is in", "Peru", name, old_target="Chad"),), **fields)


LYON = city(
    "Lyon",
    rephrases=(query("Where is Lyon? In", "Peru"),),
    locality={"near": (query("Nice is in", "Rome"),), "far": (query("2 + 2 =", "four"),)},
    portability={"hop": (query("People of Lyon speak", "Spanish"),)},
    multi_hop=(query("Lyon's president?", "Dina", "Dina B"), query("Who rules Lyon?", "Dina", "Dina B")),
)


def test_a_pool_is_asked_in_one_call_and_each_question_once() -> None:
    records = [LYON, city("Oslo", locality={"far": (query("2 + 2 =", "four"),)})]
    original, edited = Scripted({}), Scripted({})
    originals = Answers(original)
    originals.ask(records, exact_match=True, batch_size=7)
    evaluate_pool(edited, originals, records, exact_match=True, batch_size=7)
    for model in (original, edited):
        assert len(model.scored) == len(model.generated) == 1
        assert len(model.scored[0]) == len(set(model.scored[0])) == 10  # 5 of LYON, 2 x 2 of multi-hop, Oslo's edit
        assert model.batch_sizes == {7}


def test_originals_are_asked_once_over_pool_sizes_and_editors() -> None:
    records = [city(f"City{i}", rephrases=(query(f"Rephrase {i}", "Peru"),)) for i in range(4)]
    original = Scripted({})
    originals = Answers(original)
    for editor in (Taught(), Taught()):
        for size in (1, 2, 4):
            evaluate(editor, BACKBONE, records, size, originals=originals)
    asked = [pair for call in original.scored for pair in call]
    assert len(asked) == len(set(asked)) == 8


def test_unasked_original_is_refused() -> None:
    with pytest.raises(KeyError, match="before the edit"):
        evaluate_pool(Scripted({}), Answers(Scripted({})), [LYON])


def test_the_original_answers_before_the_edit() -> None:
    # EasyEdit #643: locality against a model that is already edited always agrees
    original = Scripted({"Nice is in": "Rome", "2 + 2 =": "four"})
    result = evaluate(Taught(original), BACKBONE, [LYON], 1, originals=Answers(original))
    assert result.aggregates["locality/token_agreement"]["value"] == 0.0


def test_query_that_cannot_be_scored_or_generated_is_absent() -> None:
    class Mute(Scripted):
        def score(self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32) -> list[TargetScore]:
            scores = super().score(prompts, targets, batch_size)
            empty = torch.zeros(0)
            return [s if p else TargetScore(empty, empty, empty) for s, p in zip(scores, prompts, strict=True)]

    record = city("Lyon", locality={"near": (query("", "x"), query("Nice is in", "y"))})
    result = evaluate(Taught(), BACKBONE, [record], 1, exact_match=True, originals=Answers(Mute({"Nice is in": "?"})))
    assert result.records[0]["post"]["locality"] == {"near_acc": [1.0], "near_em": [0.0]}


def chain(name: str, edit: tuple[str, str], *hops: tuple[str, str]) -> EditRecord:
    """A case of MQuAKE: one edit, asked by its question too, and the chain of its multi-hop question."""
    return EditRecord(
        name,
        (EditRequest(f"{name} is in", edit[1]),),
        rephrases=(query(*edit),),
        portability={HOP: tuple(query(*hop) for hop in (edit, *hops))},
        multi_hop=(query(f"Who rules the land of {name}?", hops[-1][1]),),
    )


CASES = [
    chain("Cy", ("Where is Cy?", "Chad"), ("Who rules Chad?", "Ada")),
    chain("Chad", ("Who rules Chad?", "Bob"), ("Where was Bob born?", "Oslo")),  # another ruler than cy's chain has
]


def test_multi_hop_questions_of_contradicted_cases_are_not_asked() -> None:
    kept, left_out = without_collisions(CASES)
    assert [record.multi_hop for record in kept] == [(), CASES[1].multi_hop]
    assert left_out == [1, 0]
    together = evaluate(Taught(), BACKBONE, CASES, 2, originals=Answers(Scripted({})))
    assert together.settings["records_contradicted"] == 1
    assert together.aggregates["multi_hop/token_accuracy_max"]["records"] == 1
    assert together.aggregates["reliability/token_accuracy"]["records"] == 2  # of their own edits all are asked
    apart = evaluate(Taught(), BACKBONE, CASES, 1, originals=Answers(Scripted({})))
    assert apart.settings["records_contradicted"] == 0
    assert apart.aggregates["multi_hop/token_accuracy_max"]["records"] == 2


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_queries_are_one_at_least(count: int) -> None:
    with pytest.raises(ValueError, match=f"queries_per_kind must be at least 1, or null to ask all .*; got {count}"):
        fewer_queries(CASES[0], count, 0)


def test_fewer_queries_hide_no_contradiction() -> None:
    fewer = [fewer_queries(record, 1, 0) for record in CASES]
    assert fewer == CASES
    plain = [replace(record, multi_hop=()) for record in CASES]
    assert [len(fewer_queries(record, 1, 0).portability[HOP]) for record in plain] == [1, 1]


def test_collisions() -> None:
    york = city("New York", portability={"hop": (query("The mayor of New York is", "Ada"),)})
    lyon = city(
        "Lyon",
        rephrases=(query("Lyon, not New York, is in", "Peru"),),
        locality={
            "near": (
                query("New York is in", "Ohio"),  # names the other record's subject
                query("The (New-York) river is the", "Hudson"),  # in words
                query("New Yorkers live in", "Ohio"),  # not the whole word
                query("new york is in", "Ohio"),  # not the name
                query("Lyon was in", "Gaul"),  # its own subject
            ),
            "gone": (query("Is New York big?", "yes"),),
        },
        portability={"hop": (query("People of Lyon who go to New York see", "Ada"),)},
        multi_hop=(query("Who rules New York?", "Ada"),),
    )
    (thin_lyon, thin_york), left_out = without_collisions([lyon, york])
    assert left_out == [4, 0]
    assert [q.prompt for q in thin_lyon.locality["near"]] == ["New Yorkers live in", "new york is in", "Lyon was in"]
    assert thin_lyon.locality["gone"] == ()
    assert thin_lyon.portability["hop"] == ()
    assert thin_lyon.rephrases == lyon.rephrases
    assert thin_lyon.multi_hop == lyon.multi_hop
    assert thin_york == york
    assert without_collisions([lyon]) == ([lyon], [0])

    result = evaluate(Taught(), BACKBONE, [lyon, york], 2, originals=Answers(Scripted({})))
    assert [r["left_out"] for r in result.records] == [4, 0]
    assert result.settings["queries_left_out"] == 4
    assert set(result.records[0]["post"]["locality"]) == {"near_acc"}
    assert result.aggregates["portability/token_accuracy"]["records"] == 1
    apart = evaluate(Taught(), BACKBONE, [lyon, york], 1, originals=Answers(Scripted({})))
    assert apart.settings["queries_left_out"] == 0


def test_another_edit_of_the_same_subject_collides() -> None:
    first = city("Lyon", locality={"other": (query("The river of Lyon is the", "Rhone"),)})
    second = EditRecord("2", (EditRequest("The river of Lyon is the", "Nile", "Lyon"),))
    assert without_collisions([first, second])[1] == [1, 0]


def test_own_edit_only_sees_its_own_edit_but_the_pools_questions() -> None:
    oslo = city("Oslo")
    lyon = city("Lyon", locality={"near": (query("Oslo is in", "Norway"), query("Nice is in", "Rome"))})
    editor, done = TaughtOwn(), []
    result = evaluate(editor, BACKBONE, [lyon, oslo], 2, originals=Answers(Scripted({})), progress=done.append)
    assert editor.pools == [["Lyon is in"], ["Oslo is in"]]
    assert result.pool_size == 2
    assert result.settings["own_edit_only"] is True
    assert result.settings["queries_left_out"] == 1
    assert [p for p, _ in editor.models[0].scored[0]] == ["Lyon is in", "Nice is in"]
    assert done == [1, 1]
    assert result.aggregates["reliability/token_accuracy"]["value"] == 1.0


def test_pools() -> None:
    records = [city(f"City{i}") for i in range(7)]
    editor, done = Taught(), []
    result = evaluate(editor, BACKBONE, records, 3, originals=Answers(Scripted({})), progress=done.append)
    assert [len(pool) for pool in editor.pools] == done == [3, 3]
    assert [r["case_id"] for r in result.records] == [f"City{i}" for i in range(6)]
    assert (result.settings["pools"], result.settings["records"], result.settings["records_dropped"]) == (2, 6, 1)
    few = evaluate(Taught(), BACKBONE, records, 100, originals=Answers(Scripted({})))
    assert (few.pool_size, len(few.records), few.settings["records_dropped"]) == (7, 7, 0)
    assert few.edit_seconds > 0
    assert few.answer_seconds > 0
    for bad in ([], 1), (records, 0):
        with pytest.raises(ValueError, match="pool size"):
            split_pools(*bad)


def test_conflicting_edits_of_a_pool_are_counted_and_made_all_the_same() -> None:
    cities = [city(name) for name in ("Lyon", "Oslo", "Lyon", "Nice", "Lyon")]
    other = replace(cities[2], id="other", requests=(replace(cities[2].request, target="Chad "),))
    records = [cities[0], cities[1], other, cities[3]]
    told = EditRecord("text", (EditRequest(text="Lyon is in Peru."),))  # of free text nothing is told
    assert conflicting_edits([*records, told, told]) == 2
    assert conflicting_edits([cities[0], cities[2], cities[4]]) == 0  # one prompt, one target
    editor = Taught()
    together = evaluate(editor, BACKBONE, records, 4, originals=Answers(Scripted({})))
    assert (together.settings["conflicting_edits"], together.settings["records"]) == (2, 4)
    assert [len(pool) for pool in editor.pools] == [4]
    apart = evaluate(Taught(), BACKBONE, records, 2, originals=Answers(Scripted({})))
    assert apart.settings["conflicting_edits"] == 0


def test_only_the_first_of_a_pool_are_asked_and_all_are_edited() -> None:
    records = [city(f"City{i}") for i in range(6)]
    original, editor, done = Scripted({}), Taught(), []
    judge = TokenAccuracy(Answers(original))
    result = evaluate_pools(judge, editor, BACKBONE, records, 3, progress=done.append, asked=2)
    assert [len(pool) for pool in editor.pools] == done == [3, 3]
    assert [r["case_id"] for r in result.records] == ["City0", "City1", "City3", "City4"]
    assert [len(model.scored[0]) for model in editor.models] == [2, 2]
    assert len(original.scored[0]) == 2  # nor is the unedited model asked more
    assert (result.settings["records"], result.settings["edited"], result.settings["requests"]) == (4, 6, 6)
    assert result.settings["asked_of_each_pool"] == 2
    own = TaughtOwn()
    evaluate_pools(judge, own, BACKBONE, records, 3, asked=2)
    assert len(own.pools) == 4  # what is not asked need not be edited alone


def test_real_editors_on_a_tiny_model() -> None:
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "initializer_range": 0.4,
    }
    torch.manual_seed(0)
    backbone = load_backbone(BackboneConfig("random:llama", overrides=shape))
    records = [LYON, city("Oslo", locality={"far": (query("2 + 2 =", "four"),)})]
    unedited = evaluate(Unedited(), backbone, records, 2, exact_match=True)
    assert unedited.aggregates["locality/token_agreement"]["value"] == 1.0
    assert all(r["pre"] == r["post"] for r in unedited.records)
    in_context = evaluate(InContext(), backbone, records, 2)
    right = evaluate(RightEdit(), backbone, records, 2)
    assert in_context.records != unedited.records
    assert right.settings["queries_left_out"] == in_context.settings["queries_left_out"]
    alone = evaluate(InContext(), backbone, records, 1)
    assert right.records == alone.records  # in-context learning of a pool of one
