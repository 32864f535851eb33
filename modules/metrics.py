"""How an edit is measured. Every name carries its protocol, because figures of two protocols are not comparable.

A record's value is the mean over its queries of one sort (for multi-hop the maximum: any question counts); an aggregate
is the mean over the records that have such a query, so a record without one neither helps nor hurts.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.records import EditRecord
from modules.editor import TargetScore

PROTOCOLS: dict[str, str] = {
    "reliability/token_accuracy": "Teacher-forced share of the new target's tokens that are the argmax, at the edits' "
    "own prompts (EasyEdit's rewrite_acc).",
    "generality/token_accuracy": "The same at rephrased prompts (EasyEdit's rephrase_acc).",
    "locality/token_agreement": "Share of the gold answer's positions, teacher-forced, at which the argmax equals that "
    "of the unedited model, right or wrong (EasyEdit's locality); queries that name the subject of another edit of the "
    "pool are left out.",
    "locality/<kind>/token_agreement": "The same over one kind of locality query.",
    "portability/token_accuracy": "Teacher-forced token accuracy of answers that follow from the edit (EasyEdit's "
    "portability, first answer only); queries that name the subject of another edit of the pool are left out.",
    "portability/<kind>/token_accuracy": "The same over one kind of portability query.",
    "multi_hop/token_accuracy_max": "Teacher-forced token accuracy, the maximum over a case's questions and over the "
    "answer and its aliases (as InComeS scores MQuAKE; gives partial credit, unlike MQuAKE's own exact match).",
    "<sort>/exact_match": "Share of queries whose greedy continuation, in lower case and without punctuation and "
    "articles (SQuAD's normalisation), equals or begins with an answer or alias, in whole words; zero-shot.",
    "locality/exact_match": "The same against the gold answer, which the unedited model need not know: compare with "
    "the unedited model's row.",
    "multi_hop/exact_match": "1 where any of a case's questions is an exact match (MQuAKE's any of three, but "
    "zero-shot).",
}

_MAIN = {
    "reliability": "token_accuracy",
    "generality": "token_accuracy",
    "locality": "token_agreement",
    "portability": "token_accuracy",
    "multi_hop": "token_accuracy_max",
}
_WORD = re.compile(r"\w+(?:(?<=\d)[.,](?=\d)\w+)*")  # 3.5 and 1,000 are one word
_ARTICLES = {"a", "an", "the"}


def token_agreement(score: TargetScore, original: TargetScore) -> float:
    """Share of answer positions where both models' most probable token is the same (EasyEdit's locality).

    Both were teacher-forced on the same answer. Where one of them has no prediction for the text's very first token,
    the positions that both have are compared.
    """
    n = min(len(score.predicted), len(original.predicted))
    if not n:
        return 0.0
    return float((score.predicted[-n:] == original.predicted[-n:]).float().mean())


def exact_match(text: str, answers: Iterable[str]) -> bool:
    """Whether a generated text equals, or in whole words begins with, one of the answers after `normalise`.

    The normalisation is that of SQuAD (Rajpurkar et al. 2016); beginning with the answer is enough, because a base
    model does not stop after it. An answer of nothing but articles or punctuation has to be the whole text.
    """
    words = normalise(text)
    for answer in answers:
        wanted = normalise(answer)
        if wanted and words[: len(wanted)] == wanted:
            return True
        if not wanted and text.strip().casefold() == answer.strip().casefold():
            return True
    return False


def normalise(text: str) -> list[str]:
    """The words of a text: NFKC, case folded, without punctuation and English articles."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [word for word in words if word not in _ARTICLES]


def record_values(answers: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value of one record, from the `post` (or `pre`) of a result in EasyEdit's shape.

    `*_acc` and `*_em` are lists with one number per query; an empty or absent list gives no value.
    """
    hits: dict[str, list[float]] = {}
    for field, sort in (("rewrite", "reliability"), ("rephrase", "generality")):
        for suffix in ("acc", "em"):
            hits[f"{sort}/{_measure(sort, suffix)}"] = answers.get(f"{field}_{suffix}", [])
    for sort in ("locality", "portability"):
        for key, found in answers.get(sort, {}).items():
            kind, suffix = key.rsplit("_", 1)
            hits.setdefault(f"{sort}/{_measure(sort, suffix)}", []).extend(found)
            hits[f"{sort}/{kind}/{_measure(sort, suffix)}"] = found
    values = {name: sum(found) / len(found) for name, found in hits.items() if found}
    for suffix in ("acc", "em"):
        if found := answers.get(f"multi_hop_{suffix}"):
            values[f"multi_hop/{_measure('multi_hop', suffix)}"] = max(found)
    return values


def summarise(
    results: Sequence[Mapping[str, Any]],
    seed: int = 0,
    resamples: int = 1000,
    values: Callable[[Mapping[str, Any]], Mapping[str, float]] = record_values,
) -> dict[str, dict[str, Any]]:
    """Metric name -> {value, ci, records}: the mean over records, its 95% interval, and how many records it is over.

    The interval is the percentile bootstrap over records (Efron 1979). Records are resampled, not queries, since the
    queries of a record stand or fall together. Of a single record it is that record's value, twice.

    Args:
        values: the metrics of one record, from its `post`.
    """
    columns: dict[str, list[float]] = {}
    for result in results:
        for name, value in values(result["post"]).items():
            columns.setdefault(name, []).append(value)
    summary = {}
    for name, column in columns.items():
        draw = np.random.default_rng(seed)
        found = np.array(column)
        means = [found[draw.integers(len(found), size=len(found))].mean() for _ in range(resamples)]
        low, high = np.quantile(means, (0.025, 0.975))
        summary[name] = {
            "value": float(found.mean()),
            "ci": [float(low), float(high)],
            "records": len(found),
        }
    return summary


def from_file(value: float | None) -> float:
    """A number of a result file, where null stands for one that is none (`trainers.written.write_json`): NaN again, so
    that no mean passes over it."""
    return math.nan if value is None else value


class EditMetrics(Metric):
    """Running means of `record_values` over the records of all ranks, for validation during training.

    Args:
        locality, portability: the kinds that get a mean of their own. They are fixed here, not found while updating,
            because every rank must hold the same states; a kind that is not named counts in the overall mean only.
    """

    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, locality: Iterable[str] = (), portability: Iterable[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        kinds = {"locality": sorted(set(locality)), "portability": sorted(set(portability))}
        self.names = tuple(
            f"{prefix}/{_measure(sort, suffix)}"
            for sort in _MAIN
            for prefix in (sort, *(f"{sort}/{kind}" for kind in kinds.get(sort, ())))
            for suffix in ("acc", "em")
        )
        zeros = torch.zeros(len(self.names), dtype=torch.float64)
        self.add_state("sums", zeros.clone(), dist_reduce_fx="sum")
        self.add_state("counts", zeros.clone(), dist_reduce_fx="sum")

    @classmethod
    def of(cls, records: Iterable[EditRecord], **kwargs: Any) -> Self:
        """Metrics with every kind that occurs in the records; give the same records on every rank."""
        records = list(records)
        locality, portability = ({k for r in records for k in getattr(r, s)} for s in ("locality", "portability"))
        return cls(locality, portability, **kwargs)

    def update(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Add per-record results, as `evaluate_pool` gives them."""
        for result in results:
            values = record_values(result["post"])
            for i, name in enumerate(self.names):
                if name in values:
                    self.sums[i] += values[name]
                    self.counts[i] += 1

    def compute(self) -> dict[str, Tensor]:
        """Metric name -> mean over records, for the metrics that any record has."""
        rows = zip(self.names, self.sums, self.counts, strict=True)
        return {name: total / count for name, total, count in rows if count}


def _measure(sort: str, suffix: str) -> str:
    return "exact_match" if suffix == "em" else _MAIN[sort]
