"""Metrics of hand-made results; every expected figure is worked out beside it."""

import math

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.editor import TargetScore
from modules.metrics import PROTOCOLS, EditMetrics, exact_match, record_values, summarise, token_agreement

A = {
    "rewrite_acc": [1.0, 0.5],
    "rephrase_acc": [0.25],
    "portability": {"hop_acc": [0.5]},
    "multi_hop_acc": [0.2, 0.8, 0.4],
    "rewrite_em": [1.0, 0.0],
    "locality": {"near_acc": [1.0, 0.0], "Other_Fact_acc": [1.0], "near_em": [0.0, 0.0]},
    "multi_hop_em": [0.0, 1.0, 0.0],
}
B = {"rewrite_acc": [1.0], "rephrase_acc": [], "locality": {"near_acc": [1.0]}, "portability": {}}


def score(predicted: list[int], target: list[int]) -> TargetScore:
    return TargetScore(torch.zeros(len(target)), torch.tensor(predicted), torch.tensor(target))


def test_record_values() -> None:
    assert record_values(A) == pytest.approx(
        {
            "reliability/token_accuracy": 0.75,  # (1 + .5) / 2
            "reliability/exact_match": 0.5,
            "generality/token_accuracy": 0.25,
            "locality/token_agreement": 2 / 3,  # three queries of two kinds, two agree
            "locality/near/token_agreement": 0.5,
            "locality/Other_Fact/token_agreement": 1.0,
            "locality/exact_match": 0.0,
            "locality/near/exact_match": 0.0,
            "portability/token_accuracy": 0.5,
            "portability/hop/token_accuracy": 0.5,
            "multi_hop/token_accuracy_max": 0.8,
            "multi_hop/exact_match": 1.0,  # any question counts
        }
    )


def test_record_values_leaves_its_argument_alone() -> None:
    record_values(A)
    assert A["locality"]["near_acc"] == [1.0, 0.0]


def test_a_record_without_a_query_does_not_count() -> None:
    summary = summarise([{"post": A}, {"post": B}])
    assert summary["generality/token_accuracy"]["value"] == 0.25  # of A alone; not (.25 + 0) / 2
    assert summary["generality/token_accuracy"]["records"] == 1
    assert summary["reliability/token_accuracy"]["value"] == 0.875  # records weigh alike: (.75 + 1) / 2, not 2.5 / 3
    assert summary["reliability/token_accuracy"]["records"] == 2
    assert "portability/none/token_accuracy" not in summary


def test_every_metric_has_its_protocol() -> None:
    generic = {"locality": "near", "portability": "hop"}
    for name in EditMetrics(["near"], ["hop"]).names:
        sort, *_, measure = name.split("/")
        named = name.replace(f"/{generic.get(sort, '-')}/", "/<kind>/")
        assert named in PROTOCOLS or (measure == "exact_match" and "<sort>/exact_match" in PROTOCOLS), name


def test_running_means_equal_the_summary_also_when_ranks_are_merged() -> None:
    results = [{"post": A}, {"post": B}, {"post": B}]
    whole, first, second = (EditMetrics(["near", "Other_Fact"], ["hop"]) for _ in range(3))
    whole.update(results)
    first.update(results[:1])
    second.update(results[1:])
    first.merge_state(second)
    expected = {name: row["value"] for name, row in summarise(results).items()}
    for metrics in (whole, first):
        assert {k: float(v) for k, v in metrics.compute().items()} == pytest.approx(expected)
    whole.reset()
    whole.update(results[1:])
    assert float(whole.compute()["locality/token_agreement"]) == 1.0


def test_unnamed_kind_counts_in_the_overall_mean_only() -> None:
    metrics = EditMetrics()
    metrics.update([{"post": B}])
    assert {k: float(v) for k, v in metrics.compute().items()} == {
        "reliability/token_accuracy": 1.0,
        "locality/token_agreement": 1.0,
    }


def test_kinds_are_gathered_from_records() -> None:
    request = EditRequest("p", "t")
    records = [
        EditRecord("1", (request,), locality={"near": (Query("q", ("a",)),)}),
        EditRecord("2", (request,), portability={"hop": (Query("q", ("a",)),)}),
    ]
    names = EditMetrics.of(iter(records)).names
    assert "locality/near/token_agreement" in names
    assert "portability/hop/token_accuracy" in names
    assert names == EditMetrics.of(records[::-1]).names  # the same order of states on every rank


def test_interval_contains_the_mean_and_narrows_with_records() -> None:
    def interval(n: int, seed: int = 0) -> tuple[float, list[float]]:
        results = [{"post": {"rewrite_acc": [float(i % 4 == 0)]}} for i in range(n)]
        row = summarise(results, seed=seed)["reliability/token_accuracy"]
        return row["value"], row["ci"]

    value, (low, high) = interval(400)
    assert value == 0.25
    # a mean of 400 Bernoulli(.25) draws has a standard error of sqrt(.25 * .75 / 400) = .0217
    assert low == pytest.approx(0.25 - 1.96 * 0.0217, abs=0.006)
    assert high == pytest.approx(0.25 + 1.96 * 0.0217, abs=0.006)
    _, (wide_low, wide_high) = interval(40)
    assert wide_low < low < value < high < wide_high
    assert interval(400) == interval(400)
    assert interval(400, seed=1) != interval(400)
    assert interval(1) == (1.0, [1.0, 1.0])


def test_token_agreement_is_with_the_original_not_with_the_truth() -> None:
    original = score([5, 6, 7, 8], [1, 2, 3, 4])
    assert token_agreement(score([5, 6, 7, 8], [1, 2, 3, 4]), original) == 1.0  # both wrong alike
    assert token_agreement(score([1, 2, 3, 4], [1, 2, 3, 4]), original) == 0.0  # right, but changed
    assert token_agreement(score([5, 6, 0, 8], [1, 2, 3, 4]), original) == 0.75
    # no prediction for the first token: the last three are compared
    assert token_agreement(score([6, 7, 0], [2, 3, 4]), original) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        (" Paris", ["Paris"], True),
        ("paris, the capital of France", ["Paris"], True),
        ("Parisian", ["Paris"], False),
        ("in Paris", ["Paris"], False),
        ("Par", ["Paris"], False),
        ("", ["Paris"], False),
        ("The United Kingdom.\nThe", ["United Kingdom"], True),
        ("United", ["United Kingdom"], False),
        ("UK\n", ["United Kingdom", "U.K.", "UK"], True),
        ("New York", ["New-York"], True),
        ("France—a country", ["France"], True),
        ("3.5 million", ["3"], False),
        ("3.5 million", ["3.5"], True),
        ("1990s", ["1990"], False),
        ("ﬁnch", ["finch"], True),  # NFKC
        ("STRASSE", ["Straße"], True),  # case folded
        ("anything", ["The"], False),
        ("the", ["The"], True),
        ("anything", ["?!"], False),
    ],
)
def test_exact_match(text: str, answers: list[str], expected: bool) -> None:
    assert exact_match(text, answers) is expected


def test_token_accuracy_is_the_share_of_argmax_tokens() -> None:
    assert score([1, 0, 3], [1, 2, 3]).accuracy == pytest.approx(2 / 3)
    assert math.isclose(score([1], [1]).accuracy, 1.0)
