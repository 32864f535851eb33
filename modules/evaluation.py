"""Measure an editor: edit a pool of records at once, put every record's questions to the edited model, and judge.

All edits of a pool are in place before the first question is asked, so what is measured is what is retained.
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from datamodules.readers.mquake import HOP, conflicting
from datamodules.records import EditRecord, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.judging import Case, Evaluation, Judge, evaluate_pools, rewrite, split_pools, thinned
from modules.metrics import PROTOCOLS, record_values, summarise, token_agreement
from modules.metrics import exact_match as is_exact_match

__all__ = [
    "Answers",
    "Evaluation",
    "RecordPool",
    "TokenAccuracy",
    "check_queries_per_kind",
    "evaluate",
    "evaluate_pool",
    "fewer_queries",
    "questions",
    "scored_answers",
    "split_pools",
    "without_collisions",
]


class RecordPool(Protocol):
    """A validation batch: records that are edited together."""

    records: list[EditRecord]


class Answers:
    """What one model answers: scores by (prompt, target) and greedy texts by prompt, each asked for once.

    Keep the answers of the unedited model and hand them in again for other pool sizes and editors. Ask them *before* an
    edit: an edit may live in the backbone's own modules, and then the unedited model cannot be asked inside its `with`.
    """

    def __init__(self, model: Edited) -> None:
        self.model = model
        self.scores: dict[tuple[str, str], TargetScore] = {}
        self.texts: dict[str, str] = {}

    def ask(
        self,
        records: Iterable[EditRecord],
        exact_match: bool = False,
        batch_size: int = 32,
        max_new_tokens: int = 16,
    ) -> None:
        """Answer all questions of the records that are not answered yet, in one pass.

        Args:
            exact_match: generate too.
            max_new_tokens: length of a generated text; an answer that is longer cannot match.
        """
        queries = [(field, q) for record in records for field, qs in questions(record).items() for q in qs]
        pairs = dict.fromkeys((q.prompt, answer) for field, q in queries for answer in scored_answers(field, q))
        pairs = [pair for pair in pairs if pair not in self.scores]
        if pairs:
            prompts, targets = map(list, zip(*pairs, strict=True))
            self.scores |= zip(pairs, self.model.score(prompts, targets, batch_size=batch_size), strict=True)
        prompts = dict.fromkeys(q.prompt for _, q in queries if q.prompt) if exact_match else ()
        prompts = [prompt for prompt in prompts if prompt not in self.texts]
        if prompts:
            texts = self.model.generate(prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
            self.texts |= zip(prompts, texts, strict=True)


class TokenAccuracy(Judge):
    """The default protocol, EasyEdit's: teacher-forced token accuracy, and exact match of generated answers.

    Args:
        originals: the unedited model's answers, kept over calls.
        exact_match: generate too.
        max_new_tokens: length of a generated text; an answer that is longer cannot match.
    """

    name = "default"
    definitions = PROTOCOLS

    def __init__(
        self, originals: Answers, exact_match: bool = False, batch_size: int = 32, max_new_tokens: int = 16
    ) -> None:
        self.originals = originals
        self._options: dict[str, Any] = {
            "exact_match": exact_match,
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
        }

    def cases(self, records: Sequence[EditRecord]) -> list[Case]:
        return thinned(records, *without_collisions(records))

    def ask_unedited(self, cases: Sequence[Case]) -> None:
        self.originals.ask([case.record for case in cases], **self._options)

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        return _results(edited, self.originals, cases, **self._options)

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        return record_values(post)

    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        return summarise(results, seed)

    def prompts(self, cases: Sequence[Case]) -> list[str]:
        return list(dict.fromkeys(q.prompt for c in cases for of in questions(c.record).values() for q in of))

    def options(self) -> dict[str, Any]:
        return self._options


def evaluate(
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    pool_size: int,
    exact_match: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    seed: int = 0,
    originals: Answers | None = None,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Edited, Sequence[EditRecord]], None] | None = None,
) -> Evaluation:
    """`modules.judging.evaluate_pools` by the default protocol.

    Args:
        originals: the unedited model's answers, kept over calls; by default asked anew of `backbone`.
    """
    judge = TokenAccuracy(originals or Answers(Edited(backbone)), exact_match, batch_size, max_new_tokens)
    return evaluate_pools(judge, editor, backbone, records, pool_size, seed, progress, look)


def evaluate_pool(
    edited: Edited,
    originals: Answers,
    records: Sequence[EditRecord],
    exact_match: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 16,
) -> list[dict[str, Any]]:
    """Judge a model that is under all the edits of `records` at once.

    Args:
        originals: the unedited model's answers; `originals.ask(records)` must have been called before the edit.

    Returns:
        One result per record, in EasyEdit's shape: `case_id`, `requested_rewrite` (prompt, target_new, ground_truth,
        subject, text; a list of them where a record has several edits, as in MQuAKE), `pre` of the unedited and `post`
        of the edited model. Each of these two holds `rewrite_acc`, `rephrase_acc`, `locality` {kind_acc}, `portability`
        {kind_acc} and, where the record has such questions, `multi_hop_acc`: lists with a number per query, in the
        record's order; with `exact_match` the same as `..._em`. Locality is agreement with the unedited model, so 1 in
        `pre`. `left_out` counts the record's questions that `without_collisions` took out.
        A query of a single token with nothing before it cannot be scored and is absent.

    Raises:
        KeyError: for a question that the unedited model was not asked.
    """
    judge = TokenAccuracy(originals, exact_match, batch_size, max_new_tokens)
    return judge.ask(edited, judge.cases(records))


def _results(
    edited: Edited,
    originals: Answers,
    cases: Sequence[Case],
    exact_match: bool,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    answers = Answers(edited)
    answers.ask([case.record for case in cases], exact_match, batch_size, max_new_tokens)
    return [
        {
            "case_id": case.record.id,
            "requested_rewrite": rewrite(case.record),
            "pre": _judge(case.record, originals, originals, exact_match),
            "post": _judge(case.record, answers, originals, exact_match),
            "left_out": case.left_out,
        }
        for case in cases
    ]


def check_queries_per_kind(count: int | None, name: str = "queries_per_kind") -> None:
    """Refuse a number of queries below 1; None asks all.

    Args:
        name: what a user set it by.

    Raises:
        ValueError: for a number below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"{name} must be at least 1, or null to ask all queries; got {count}")


def fewer_queries(record: EditRecord, per_kind: int, seed: int) -> EditRecord:
    """The record with at most `per_kind` rephrases, and other queries of each kind, drawn by `seed`.

    Of a record with multi-hop questions rephrases and hops are all kept: by these is told what contradicts it.

    Raises:
        ValueError: for a number below 1.
    """
    check_queries_per_kind(per_kind)
    draw = random.Random(f"{seed}/{record.id}")

    def some(queries: Sequence[Query]) -> tuple[Query, ...]:
        return tuple(draw.sample(list(queries), min(per_kind, len(queries))))

    return replace(
        record,
        rephrases=record.rephrases if record.multi_hop else some(record.rephrases),
        locality={kind: some(queries) for kind, queries in record.locality.items()},
        portability={
            kind: tuple(queries) if kind == HOP and record.multi_hop else some(queries)
            for kind, queries in record.portability.items()
        },
    )


def questions(record: EditRecord) -> dict[str, tuple[Query, ...]]:
    """All questions of a record by field: rewrite, rephrase, locality/<kind>, portability/<kind>, multi_hop."""
    own = tuple(Query(r.prompt, (r.target,)) for r in record.requests if r.target)  # a free-text edit asks nothing
    by_kind = {
        f"{sort}/{kind}": tuple(queries)
        for sort, kinds in (("locality", record.locality), ("portability", record.portability))
        for kind, queries in kinds.items()
    }
    return {"rewrite": own, "rephrase": record.rephrases, **by_kind, "multi_hop": record.multi_hop}


def scored_answers(field: str, query: Query) -> tuple[str, ...]:
    """The answers that are scored: the target; for multi-hop questions its aliases too."""
    return query.answers if field == "multi_hop" else (query.target,)


def without_collisions(records: Sequence[EditRecord]) -> tuple[list[EditRecord], list[int]]:
    """Leave out queries whose right answer another edit of the pool may change (as UniEdit does for locality).

    A locality or portability query is left out when its prompt names, in whole words and the same case, the subject of
    another record's edit. An edit whose source names no subject leaves nothing out. Multi-hop questions are left out
    where they rest on a hop that another record edits to something else (`datamodules.readers.mquake.conflicting`).

    Returns:
        The records without those queries, and how many each of them lost.
    """
    owners: dict[tuple[str, ...], set[int]] = {}
    for i, record in enumerate(records):
        for request in record.requests:
            owners.setdefault(_words(request.subject or ""), set()).add(i)
    owners.pop((), None)
    lengths = sorted({len(subject) for subject in owners})

    def collides(query: Query, i: int) -> bool:
        words = _words(query.prompt)
        spans = (words[at : at + n] for n in lengths for at in range(len(words) - n + 1))
        return any(owners.get(span, set()) - {i} for span in spans)

    kept, left_out = [], []
    for i, (record, against) in enumerate(zip(records, conflicting(records), strict=True)):
        fewer = replace(
            record,
            multi_hop=() if against else record.multi_hop,
            locality={k: tuple(q for q in qs if not collides(q, i)) for k, qs in record.locality.items()},
            portability={k: tuple(q for q in qs if not collides(q, i)) for k, qs in record.portability.items()},
        )
        kept.append(fewer)
        left_out.append(_count(record) - _count(fewer))
    return kept, left_out


def _judge(record: EditRecord, answers: Answers, originals: Answers, exact_match: bool) -> dict[str, Any]:
    judged: dict[str, Any] = {"locality": {}, "portability": {}}
    for field, queries in questions(record).items():
        sort, _, kind = field.partition("/")
        if not queries and field not in ("rewrite", "rephrase"):
            continue
        place, key = (judged[sort], kind) if kind else (judged, field)
        found = [_accuracy(field, query, answers, originals) for query in queries]
        place[f"{key}_acc"] = [value for value in found if value is not None]
        if exact_match:
            place[f"{key}_em"] = [
                float(is_exact_match(_asked(answers.texts, q.prompt), q.answers)) for q in queries if q.prompt
            ]
    return judged


def _accuracy(field: str, query: Query, answers: Answers, originals: Answers) -> float | None:
    """Token accuracy, or agreement for locality; the best answer's for multi-hop. None where nothing was predicted."""
    values = []
    for answer in scored_answers(field, query):
        score = _asked(answers.scores, (query.prompt, answer))
        before = _asked(originals.scores, (query.prompt, answer))
        if len(score.target) and len(before.target):
            value = token_agreement(score, before) if field.startswith("locality/") else score.accuracy
            values.append(round(value, 6))
    return max(values, default=None)


def _asked(known: dict[Any, Any], question: Any) -> Any:
    if question not in known:
        raise KeyError(f"the unedited model was not asked {question!r}; call originals.ask(records) before the edit")
    return known[question]


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def _count(record: EditRecord) -> int:
    return sum(map(len, (*record.locality.values(), *record.portability.values(), record.multi_hop)))
