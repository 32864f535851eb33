"""CounterFact's protocol with written-down log-probabilities, and on a real model against the plainest reference."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.byte_tokenizer import byte_tokenizer
from modules.counterfact import COUNTERFACT, COUNTERFACT_PROTOCOLS, CounterFact
from modules.editor import Edited, Editor, TargetScore
from modules.fluency import References
from modules.judging import evaluate_pools
from modules.training_free.icl import InContext, RightEdit, Unedited

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu")))
PARAPHRASES = ("Where is Lyon? In", "Lyon lies in")
NEIGHBOURS = ("Nice is in", "Metz is in")
LYON = EditRecord(
    "lyon",
    (EditRequest("Lyon is in", "Japan", "Lyon", old_target="France"),),
    rephrases=tuple(Query(p, ("Japan",)) for p in PARAPHRASES),
    locality={"neighborhood": tuple(Query(p, ("France",)) for p in NEIGHBOURS), "other": (Query("2 + 2 =", ("4",)),)},
)
# probabilities of the tokens of a target, by prompt: (new target, old target)
LYON_SAYS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "Lyon is in": ((0.5, 0.125), (0.2,)),  # sqrt(.5 * .125) = .25 > .2, though the product is .0625
    PARAPHRASES[0]: ((0.1,), (0.4,)),
    PARAPHRASES[1]: ((0.6,), (0.9, 0.1, 1 / 90)),  # cube root of .001 = .1
    NEIGHBOURS[0]: ((0.2,), (0.3,)),
    NEIGHBOURS[1]: ((0.2,), (0.2,)),  # equal: neither ROME nor MEMIT counts it
}


class Scripted(Edited):
    """Gives the tokens of targets the probabilities that are written down."""

    def __init__(self, says: Mapping[tuple[str, str], Sequence[float]]) -> None:
        self.backbone, self.context, self.says = BACKBONE, "", says
        self.asked: list[tuple[str, str]] = []

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        self.asked += zip(prompts, targets, strict=True)
        logs = [torch.tensor(self.says[pair]).log() for pair in zip(prompts, targets, strict=True)]
        return [TargetScore(log, torch.zeros(len(log)), torch.zeros(len(log))) for log in logs]


class Writes(Editor):
    """Yields a scripted model, whatever the edits are."""

    name = "writes"

    def __init__(self, *says: tuple[EditRecord, Mapping[str, tuple[Sequence[float], Sequence[float]]]]) -> None:
        self.says = {
            (prompt, target): probabilities
            for record, of in says
            for prompt, pair in of.items()
            for target, probabilities in zip((record.request.target, record.request.old_target), pair, strict=True)
        }
        self.model = Scripted(cast(Any, self.says))
        self.pools: list[int] = []

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        self.pools.append(len(requests))
        yield self.model


def figures(evaluation: Any) -> dict[str, float]:
    return {name.removeprefix("counterfact/"): cell["value"] for name, cell in evaluation.aggregates.items()}


def test_every_figure_of_a_written_down_answer() -> None:
    evaluation = evaluate_pools(COUNTERFACT, Writes((LYON, LYON_SAYS)), BACKBONE, [LYON], 1)
    assert figures(evaluation) == pytest.approx(
        {
            "ES": 1.0,
            "EM": 0.25 - 0.2,
            "PS": 0.5,  # no, yes
            "PM": ((0.1 - 0.4) + (0.6 - 0.1)) / 2,
            "NS": 0.5,  # yes, a tie
            "NM": ((0.3 - 0.2) + 0) / 2,
            "S": 3 / (1 / 1 + 1 / 0.5 + 1 / 0.5),
        },
        abs=1e-6,
    )
    assert set(evaluation.aggregates) == set(COUNTERFACT_PROTOCOLS)
    assert all(set(cell) == {"value", "ci", "records"} for cell in evaluation.aggregates.values())
    (result,) = evaluation.records
    assert result["requested_rewrite"]["ground_truth"] == "France"
    (own,) = result["post"]["rewrite_prompts_probs"]  # MEMIT's shape and unit: nats per token
    assert own == pytest.approx({"target_new": -math.log(0.25), "target_true": -math.log(0.2)})
    assert [len(result["post"][f"{s}_prompts_probs"]) for s in ("paraphrase", "neighborhood")] == [2, 2]


def test_means_are_over_records_and_the_score_is_of_them() -> None:
    oslo = EditRecord(
        "oslo",
        (EditRequest("Oslo is in", "Peru", "Oslo", old_target="Norway"),),
        rephrases=(Query("Oslo lies in", ("Peru",)),),
        locality={"neighborhood": (Query("Bergen is in", ("Norway",)),)},
    )
    # fails at its own prompt, succeeds at its one paraphrase and its one neighbour
    says = {"Oslo is in": ((0.1,), (0.2,)), "Oslo lies in": ((0.2,), (0.1,)), "Bergen is in": ((0.1,), (0.2,))}
    editor = Writes((LYON, LYON_SAYS), (oslo, says))
    evaluation = evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON, oslo], 2)
    found = figures(evaluation)
    assert (found["ES"], found["PS"], found["NS"]) == (0.5, 0.75, 0.75)  # records weigh alike, not prompts
    assert found["S"] == pytest.approx(9 / 14)  # 3 / (2 + 4/3 + 4/3); of record lyon .6, of record oslo 0
    assert editor.pools == [2]
    assert (evaluation.settings["records"], evaluation.settings["queries"]) == (2, 5 + 3)


def test_a_neighbour_that_is_edited_too_is_asked_as_published() -> None:
    metz = replace(
        LYON,
        id="metz",
        requests=(EditRequest("Metz is in", "Chad", "Metz", old_target="France"),),
        rephrases=(Query(PARAPHRASES[0], ("Chad",)),),
    )
    editor = Writes((LYON, LYON_SAYS), (metz, LYON_SAYS | {"Metz is in": ((0.9,), (0.2,))}))
    evaluation = evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON, metz], 2)
    assert [len(r["post"]["neighborhood_prompts_probs"]) for r in evaluation.records] == [2, 2]
    assert len(editor.model.asked) == len(set(editor.model.asked))  # each pair once
    assert evaluation.settings["queries"] == 5  # prompts, the two records' together


class Author(Scripted):
    """Also writes what is written down."""

    def __init__(self, says: Any, texts: Mapping[str, str]) -> None:
        super().__init__(says)
        self.texts = texts
        self.backbone = cast(Backbone, SimpleNamespace(device=BACKBONE.device, tokenizer=byte_tokenizer()))

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        return [self.texts[prompt] for prompt in prompts]


def test_what_it_writes_is_measured_on_request() -> None:
    record = replace(LYON, generation=("a b", "a b", "x"), domain="P17", target_id="Q17")
    other = replace(record, id="other", target_id="Q1")
    editor = Writes((LYON, LYON_SAYS))
    editor.model = Author(editor.says, {"a b": "a b a", "x": "yen z"})
    references = References({("P17", "Q17"): ("sushi yen", "yen"), ("P17", "Q0"): ("peso",)})
    evaluation = evaluate_pools(CounterFact(fluency=True, references=references), editor, BACKBONE, [record, other], 2)
    # "a b a b a": 1 bit of bigrams; trigrams aba 2/3, bab 1/3; "x yen z": 1 bit of bigrams, 0 of trigrams
    trigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    twice, once = 1 / 3 * 1 + 2 / 3 * trigrams, 1 / 3 * 1
    found = evaluation.aggregates
    assert found["fluency/ngram_entropy"]["value"] == pytest.approx((2 * twice + once) / 3)
    assert found["fluency/ngram_entropy"]["records"] == 2
    # references: sushi once, yen twice; idf = ln((1 + 3) / (1 + df)) + 1; of the texts only yen is known
    sushi, yen = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    assert found["consistency/tfidf_cosine"]["value"] == pytest.approx(2 * yen / math.hypot(sushi, 2 * yen))
    assert found["consistency/tfidf_cosine"]["records"] == 1  # the other one's target has no texts
    assert figures(evaluation)["ES"] == 1.0
    posts = [result["post"] for result in evaluation.records]
    assert posts[0]["text"] == ["a b a b a", "a b a b a", "x yen z"]
    assert ["reference_score" in post for post in posts] == [True, False]
    settings = evaluation.settings
    assert (settings["fluency"], settings["reference_texts"], settings["records_without_references"]) == (True, 3, 1)
    alone = evaluate_pools(CounterFact(fluency=True), editor, BACKBONE, [record], 1)
    assert "consistency/tfidf_cosine" not in {*alone.aggregates, *CounterFact(fluency=True).definitions}
    plain = evaluate_pools(COUNTERFACT, editor, BACKBONE, [record], 1)
    assert not any("fluency" in name for name in (*plain.aggregates, *COUNTERFACT.definitions))


def test_fluency_needs_prompts_and_texts_about_some_target() -> None:
    with pytest.raises(ValueError, match="record 'lyon' has no generation prompts, which --fluency needs"):
        CounterFact(fluency=True).check([LYON])
    record = replace(LYON, generation=("a",), domain="P17", target_id="Q17")
    with pytest.raises(ValueError, match="--references: the file has no text about the new attribute"):
        CounterFact(fluency=True, references=References({("P17", "Q1"): ("x",)})).check([record])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": LYON.requests * 2}, "holds 2 edits"),
        ({"requests": (replace(LYON.request, old_target=None),)}, "its old target"),
        ({"requests": (EditRequest(text="Lyon is in Japan."),)}, "a prompt, a target"),
        ({"rephrases": ()}, "no rephrases"),
        ({"locality": {"other": (Query("2 + 2 =", ("4",)),)}}, "no neighborhood queries"),
        ({"locality": {"neighborhood": (Query("Rome is in", ("Italy",)),)}}, "'Rome is in' with the answer 'Italy'"),
        ({"rephrases": (Query("", ("Japan",)),)}, "without a prompt"),
    ],
)
def test_a_record_that_lacks_something_is_named_before_any_work(change: dict[str, Any], message: str) -> None:
    editor = Writes((LYON, LYON_SAYS))
    with pytest.raises(ValueError, match=f"--protocol counterfact: record 'bad' .*{message}"):
        evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON, replace(LYON, id="bad", **change)], 2)
    assert not editor.pools


def test_a_model_that_its_edits_have_broken_is_not_measured() -> None:
    editor = Writes((LYON, LYON_SAYS | {"Nice is in": ((0.2,), (0.3, math.nan))}))
    with pytest.raises(ValueError, match=r"'France' after 'Nice is in' log-probabilities of .*nan"):
        evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON], 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_probability_is_that_of_the_whole_target_after_the_prompt(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    record = replace(LYON, rephrases=(Query("Lyon lies in ", ("Japan",)),))  # its space is not doubled
    evaluation = evaluate_pools(CounterFact(3), Unedited(), backbone, [record], 1)

    def nll(prompt: str, target: str) -> float:
        ids = backbone.tokenizer(f"{prompt.rstrip()} {target}", return_tensors="pt")["input_ids"]
        n = len(target.encode())  # the tokenizer has a token a byte; the space before the target is not of it
        with torch.no_grad():
            logits = backbone.model(input_ids=ids).logits[0].double()
        return float(torch.nn.functional.cross_entropy(logits[-n - 1 : -1], ids[0, -n:]))

    (result,) = evaluation.records
    prompts = {"rewrite": ["Lyon is in"], "paraphrase": ["Lyon lies in "], "neighborhood": NEIGHBOURS}
    for sort, of in prompts.items():
        expected = [{"target_new": nll(p, "Japan"), "target_true": nll(p, "France")} for p in of]
        assert result["post"][f"{sort}_prompts_probs"] == [pytest.approx(e, rel=1e-4) for e in expected]


def test_what_stands_before_a_query_is_counted(tiny: Callable[..., Backbone]) -> None:
    backbone, told = tiny(), "Lyon is in Japan.\n"
    settings = [
        evaluate_pools(COUNTERFACT, editor, backbone, [LYON], 1).settings
        for editor in (Unedited(), InContext(), RightEdit())
    ]
    assert [s["context_tokens"] for s in settings] == [0, len(told), len(told)]  # a token a byte
    assert [s["queries"] for s in settings] == [5, 5, 5]
