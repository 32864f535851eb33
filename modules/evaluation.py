"""Measure an editor: edit a pool of records at once, put every record's questions to the edited model, and judge.

All edits of a pool are in place before the first question is asked, so what is measured is what is retained.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.metrics import exact_match as is_exact_match
from modules.metrics import summarise, token_agreement


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


@dataclass(frozen=True)
class Evaluation:
    """One editor at one pool size.

    Attributes:
        records: per-record results, see `evaluate_pool`.
        aggregates: metric -> {value, ci, records}, see `modules.metrics.summarise`.
        edit_seconds: spent on making the edits, over all pools.
        answer_seconds: spent on the edited model's answers, over all pools.
        settings: how it was measured, and how many records and queries were left out. Where it was counted, `queries`
            is how many different prompts were asked, and `context_tokens` the mean number of tokens that the method
            put before one.
    """

    editor: str
    pool_size: int
    records: list[dict[str, Any]]
    aggregates: dict[str, dict[str, Any]]
    edit_seconds: float
    answer_seconds: float
    settings: dict[str, Any]


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
    """Edit the records a pool at a time, each pool from the unedited backbone, and measure.

    With more records than `pool_size`, those that do not fill a last pool are dropped, and counted, so that every
    figure is of one pool size. With fewer, all records are one pool, and the result carries its true size.

    An editor with `own_edit_only` is given each record's own edits and no others; its questions are still those that
    the whole pool leaves, so that the figures can be compared.

    Args:
        pool_size: in records (a record of MQuAKE holds several edits).
        seed: of the bootstrap.
        originals: the unedited model's answers, kept over calls; by default asked anew of `backbone`.
        progress: called with the number of records done since the last call.
        look: called with each edited model, and the records that it was edited with; its time does not count.

    Raises:
        ValueError: without records or with a pool size below 1; and whatever the editor raises.
    """
    pools, dropped = split_pools(records, pool_size)
    originals = originals or Answers(Edited(backbone))
    options: dict[str, Any] = {
        "exact_match": exact_match,
        "batch_size": batch_size,
        "max_new_tokens": max_new_tokens,
    }
    results: list[dict[str, Any]] = []
    edit_seconds = answer_seconds = 0.0
    queries = context_tokens = 0
    for pool in pools:
        kept, left_out = without_collisions(pool)
        originals.ask(kept, **options)
        cases = list(zip(kept, left_out, strict=True))
        for group in [[case] for case in cases] if editor.own_edit_only else [cases]:
            requests: list[EditRequest] = [request for record, _ in group for request in record.requests]
            prompts = list(dict.fromkeys(q.prompt for r, _ in group for of in questions(r).values() for q in of))
            start = now(backbone)
            with editor.edit(backbone, requests) as edited:
                ready = now(backbone)
                results += _results(edited, originals, group, **options)
                edit_seconds += ready - start
                answer_seconds += now(backbone) - ready
                queries += len(prompts)
                context_tokens += sum(edited.context_tokens(prompts))
                if look:
                    look(edited, [record for record, _ in group])
            if progress:
                progress(len(group))
    settings = options | {
        "own_edit_only": editor.own_edit_only,
        "pools": len(pools),
        "records": len(results),
        "records_dropped": dropped,
        "queries": queries,
        "queries_left_out": sum(result["left_out"] for result in results),
        "context_tokens": context_tokens / max(queries, 1),
        "bootstrap_seed": seed,
    }
    aggregates = summarise(results, seed=seed)
    return Evaluation(editor.name, len(pools[0]), results, aggregates, edit_seconds, answer_seconds, settings)


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
        `pre`. `left_out` counts the record's locality and portability queries that `without_collisions` took out.
        A query of a single token with nothing before it cannot be scored and is absent.

    Raises:
        KeyError: for a question that the unedited model was not asked.
    """
    cases = list(zip(*without_collisions(records), strict=True))
    return _results(edited, originals, cases, exact_match, batch_size, max_new_tokens)


def _results(
    edited: Edited,
    originals: Answers,
    cases: Sequence[tuple[EditRecord, int]],
    exact_match: bool,
    batch_size: int,
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    answers = Answers(edited)
    answers.ask([record for record, _ in cases], exact_match, batch_size, max_new_tokens)
    return [
        {
            "case_id": record.id,
            "requested_rewrite": rewrite(record),
            "pre": _judge(record, originals, originals, exact_match),
            "post": _judge(record, answers, originals, exact_match),
            "left_out": left_out,
        }
        for record, left_out in cases
    ]


def fewer_queries(record: EditRecord, per_kind: int, seed: int) -> EditRecord:
    """The record with at most `per_kind` rephrases, and other queries of each kind, drawn by `seed`."""
    draw = random.Random(f"{seed}/{record.id}")

    def some(queries: Sequence[Query]) -> tuple[Query, ...]:
        return tuple(draw.sample(list(queries), min(per_kind, len(queries))))

    return replace(
        record,
        rephrases=some(record.rephrases),
        locality={kind: some(queries) for kind, queries in record.locality.items()},
        portability={kind: some(queries) for kind, queries in record.portability.items()},
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
    another record's edit. An edit whose source names no subject leaves nothing out.

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
    for i, record in enumerate(records):
        thinned = replace(
            record,
            locality={k: tuple(q for q in qs if not collides(q, i)) for k, qs in record.locality.items()},
            portability={k: tuple(q for q in qs if not collides(q, i)) for k, qs in record.portability.items()},
        )
        kept.append(thinned)
        left_out.append(_count(record) - _count(thinned))
    return kept, left_out


def split_pools(records: Sequence[EditRecord], size: int) -> tuple[list[Sequence[EditRecord]], int]:
    """Full pools of `size` records, and how many records are dropped; all records as one pool where they are fewer.

    Raises:
        ValueError: without records, or for a size below 1.
    """
    if not records or size < 1:
        raise ValueError(f"needs records and a pool size of at least 1, got {len(records)} records, pool size {size}")
    if len(records) <= size:
        return [records], 0
    whole = len(records) // size * size
    return [records[at : at + size] for at in range(0, whole, size)], len(records) - whole


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


def rewrite(record: EditRecord) -> dict[str, Any] | list[dict[str, Any]]:
    """A record's edits as EasyEdit's results name them; a list where there are several."""
    rewrites = [
        {
            "prompt": request.prompt,
            "target_new": request.target,
            "ground_truth": request.old_target,
            "subject": request.subject,
            "text": request.text,
        }
        for request in record.requests
    ]
    return rewrites[0] if len(rewrites) == 1 else rewrites


def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text))


def _count(record: EditRecord) -> int:
    return sum(map(len, (*record.locality.values(), *record.portability.values())))


def now(backbone: Backbone) -> float:
    """A clock in seconds that waits for the device's queue."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    return time.perf_counter()
