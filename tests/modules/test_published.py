"""The harmonic mean and its interval, against the published tables and five-line references."""

import math
import random
from typing import Any

import numpy as np
import pytest

from modules.counterfact import COUNTERFACT
from modules.metrics import summarise
from modules.published import Published, harmonic_mean, summarise_published
from modules.zsre import ZSRE

# DistillMIKE, table 2 (S, ES, PS, NS) and table 1 (score, efficacy, paraphrase, specificity)
TABLE_2 = [
    (20.47, 14.66, 15.06, 83.97),
    (63.54, 99.91, 88.14, 38.67),
    (25.23, 17.61, 20.10, 80.83),
    (49.92, 49.36, 49.51, 50.92),
    (85.71, 99.10, 88.33, 73.59),
    (90.87, 99.48, 98.99, 77.76),
    (23.33, 16.63, 17.77, 81.94),
]
TABLE_1 = [(26.4, 26.4, 25.8, 27.0), (42.1, 69.6, 64.8, 24.1), (52.6, 99.9, 99.6, 27.0)]


def counterfact(draw: random.Random) -> dict[str, Any]:
    def asked(n: int) -> list[dict[str, float]]:
        return [{"target_new": draw.uniform(0, 5), "target_true": draw.uniform(0, 5)} for _ in range(n)]

    sorts = {"rewrite": 1, "paraphrase": 2, "neighborhood": 10}
    return {"post": {f"{sort}_prompts_probs": asked(n) for sort, n in sorts.items()}}


@pytest.mark.parametrize(("row", "tolerance"), [*((r, 0.01) for r in TABLE_2), *((r, 0.1) for r in TABLE_1)])
def test_published_scores_come_from_their_published_parts(row: tuple[float, ...], tolerance: float) -> None:
    assert harmonic_mean(np.array(row[1:])) == pytest.approx(row[0], abs=tolerance)


def test_harmonic_mean_is_zero_where_one_value_is() -> None:
    rows = np.array([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.5, 0.5]])
    assert harmonic_mean(rows).tolist() == pytest.approx([0.0, 0.0, 0.6])  # 3 / (1 + 2 + 2)


def test_the_score_is_of_the_means_and_not_a_mean_of_scores() -> None:
    # efficacy 1 and 0, paraphrase 1/2 and 1, specificity 1/2 and 1: means 1/2, 3/4, 3/4
    results = [
        {"post": {"rewrite_prompts_correct": a, "paraphrase_prompts_correct": b, "neighborhood_prompts_correct": b}}
        for a, b in (([True], [True, False]), ([False], [True]))
    ]
    # 3 / (2 + 4/3 + 4/3); of the records 3/5 and 0
    assert summarise_published(ZSRE, results)["zsre/score"]["value"] == pytest.approx(9 / 14)


def test_the_scores_interval_is_a_bootstrap_of_records() -> None:
    draw = random.Random(1)
    results = [counterfact(draw) for _ in range(12)]
    found = summarise_published(COUNTERFACT, results, seed=3, resamples=200)
    rows = [COUNTERFACT.values(result["post"]) for result in results]
    rng, scores = np.random.default_rng(3), []
    for _ in range(200):
        drawn = [rows[i] for i in rng.integers(len(rows), size=len(rows))]
        means = [sum(row[f"counterfact/{part}"] for row in drawn) / len(drawn) for part in ("ES", "PS", "NS")]
        scores.append(3 / sum(1 / mean for mean in means) if all(means) else 0.0)
    assert found["counterfact/S"]["ci"] == pytest.approx(list(np.quantile(scores, (0.025, 0.975))))
    low, high = found["counterfact/S"]["ci"]
    assert low < found["counterfact/S"]["value"] < high
    assert found["counterfact/S"]["records"] == 12
    # the others are as ever
    plain = summarise(results, 3, 200, COUNTERFACT.values)
    assert {name: row for name, row in found.items() if name != "counterfact/S"} == plain


def test_an_interval_may_reach_zero_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    worst = {f"{s}_prompts_correct": [s != "rewrite"] for s in ("rewrite", "paraphrase", "neighborhood")}
    best = {key: [True] for key in worst}
    row = summarise_published(ZSRE, [{"post": worst}, {"post": best}])["zsre/score"]
    assert row["ci"][0] == 0.0
    assert row["value"] == pytest.approx(3 / (2 + 1 + 1))
    assert all(math.isfinite(x) for x in row["ci"])
    assert not recwarn.list


@pytest.mark.parametrize("protocol", [COUNTERFACT, ZSRE])
def test_names_carry_the_protocol_and_say_how_they_are_measured(protocol: Published) -> None:
    assert all(name.startswith(f"{protocol.name}/") and len(text) > 60 for name, text in protocol.definitions.items())
    assert {protocol.score, *protocol.parts} <= set(protocol.definitions)
