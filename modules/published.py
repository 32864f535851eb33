"""What CounterFact's and zsRE's published protocols share: three means over records, summed up by their harmonic mean.

A subclass of `Published` says what is asked of a record and how the answers are judged (modules/counterfact.py,
modules/zsre.py). Against `modules.evaluation`: every query is asked, also one that names the subject of another edit
of the pool, since the publications leave none out; and a record that lacks a query is refused rather than passed over,
so that all figures, and their harmonic mean, are over the same records.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from datamodules.records import EditRecord
from modules.editor import Edited, TargetScore
from modules.judging import Case, Judge, rewrite
from modules.metrics import summarise

Pair = tuple[str, str]  # a prompt, and the target that is scored after it


class Published(Judge):
    """A published protocol.

    A query is a prompt with all targets that are scored after it; seconds are of batches of `batch_size` rows, not of a
    query that is asked alone. A model whose log-probabilities its edits have made infinite is refused, by ValueError.

    Attributes:
        definitions: the means over records, and `score`.
        parts: the three metrics whose harmonic mean is `score`.
    """

    score: str
    parts: tuple[str, str, str]

    def __init__(self, batch_size: int = 32) -> None:
        self.batch_size = batch_size

    @abstractmethod
    def lacks(self, record: EditRecord) -> str:
        """What a record is without that the protocol needs, in words that follow its name; empty where nothing is."""

    @abstractmethod
    def pairs(self, record: EditRecord) -> list[Pair]:
        """All that is asked of a record."""

    @abstractmethod
    def judge(self, record: EditRecord, scores: Mapping[Pair, TargetScore]) -> dict[str, Any]:
        """The `post` of a record's result, from the scores of its pairs."""

    def check(self, records: Iterable[EditRecord]) -> None:
        for record in records:
            if missing := self.lacks(record):
                raise ValueError(f"--protocol {self.name}: record {record.id!r} {missing}")

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        records = [case.record for case in cases]
        scores = _scores(edited, list(dict.fromkeys(p for r in records for p in self.pairs(r))), self.batch_size)
        return [{"case_id": r.id, "requested_rewrite": rewrite(r), "post": self.judge(r, scores)} for r in records]

    def prompts(self, cases: Sequence[Case]) -> list[str]:
        return list(dict.fromkeys(prompt for case in cases for prompt, _ in self.pairs(case.record)))

    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        return summarise_published(self, results, seed)

    def options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}


def harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the last dimension of shares from 0 on; where one of them is 0 it is 0, its limit."""
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1 / values).sum(-1)


def summarise_published(
    protocol: Published, results: Sequence[Mapping[str, Any]], seed: int = 0, resamples: int = 1000
) -> dict[str, dict[str, Any]]:
    """`modules.metrics.summarise`, with the score: the harmonic mean of the three means.

    The score's interval is the same bootstrap: records are drawn anew, their three means are taken, and of these the
    harmonic mean.
    """
    summary = summarise(results, seed, resamples, protocol.values)
    values = [protocol.values(result["post"]) for result in results]
    parts = np.array([[of[name] for name in protocol.parts] for of in values])  # [records, 3]
    draw = np.random.default_rng(seed)
    drawn = [harmonic_mean(parts[draw.integers(len(parts), size=len(parts))].mean(0)) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    score = {
        "value": float(harmonic_mean(parts.mean(0))),
        "ci": [float(low), float(high)],
        "records": len(results),
    }
    return {protocol.score: score} | summary


def _scores(edited: Edited, pairs: Sequence[Pair], batch_size: int) -> dict[Pair, TargetScore]:
    prompts, targets = map(list, zip(*pairs, strict=True))
    scores = dict(zip(pairs, edited.score(prompts, targets, batch_size=batch_size), strict=True))
    for (prompt, target), score in scores.items():
        if not len(score.log_probs) or not score.log_probs.isfinite().all():
            raise ValueError(
                f"the edited model gives {target!r} after {prompt!r} log-probabilities of {score.log_probs.tolist()}: "
                "nothing can be measured of a model that its edits have broken"
            )
    return scores
