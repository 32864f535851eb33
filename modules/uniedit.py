"""UniEdit's protocol: answers among the five most probable tokens, and hops that a model does not know edited in first.

Source: Chen et al. 2025, arXiv 2505.12345, and its released evaluation. A question that follows from an edit often
rests on other facts too. UniEdit asks for those first, edits in the ones that the edited model does not know, puts its
question, and takes them back. Any records can be judged so: the IBKE paper reports all its data sets by this protocol.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.evaluation import Answers, Evaluation, now, rewrite, split_pools, without_collisions
from modules.metrics import summarise

TOP = 5
UNIEDIT_PROTOCOLS: dict[str, str] = {
    "reliability/token_accuracy": "Teacher-forced share of the new target's tokens that are the argmax, at the edits' "
    "own prompts.",
    "generality/uniedit_top_5": "Teacher-forced share of the target's tokens that are among the five most probable, at "
    "rephrases and at questions that follow from the edit; the most probable for yes/no questions (SER). Before a "
    "question, each of its related hops whose target is not wholly within the top five is edited in, and taken back "
    "after it: `hops_made` says whether on top of the edits (further) or with them in one call (together).",
    "generality/<criterion>/uniedit_top_5": "The same over questions of one criterion: Rep rephrase, MH multi-hop, RR "
    "relation reversal, SER same entity, SA subject alias, OA object alias. A question may meet several.",
    "locality/uniedit_top_5": "Share of the gold answer's places, teacher-forced, at which the unedited model's most "
    "probable token, as a string, is one of the edited model's five most probable (the most probable for SER). "
    "Questions that rest on the fact of an edit of the pool are left out; where edits name no facts, those that name "
    "the subject of another edit.",
    "locality/<criterion>/uniedit_top_5": "The same over questions of one criterion: SS, RS, OS subject, relation, "
    "object specificity, 1-NF 1-N forgotten, MH, SER; the kind where a question has none.",
    "portability/uniedit_top_5": "As generality, of sets other than UniEdit, which name no criteria.",
    "multi_hop/uniedit_top_5": "The same at multi-hop questions of sets other than UniEdit: the mean over them.",
}


@dataclass
class _Asked:
    """A query of one record, and what became of it.

    Args:
        sort: generality, locality, portability or multi_hop.
        criteria: its own, or the kind where it has none.
        failed: the hops that the edited model does not know.
        share: the score, or None where there was nothing to predict.
    """

    sort: str
    query: Query
    criteria: tuple[str, ...]
    failed: tuple[EditRequest, ...] = ()
    share: float | None = None

    @property
    def top(self) -> int:
        return 1 if "SER" in self.query.criteria else TOP


@dataclass
class _Case:
    record: EditRecord
    left_out: int
    reliability: list[float] = field(default_factory=list)
    asked: list[_Asked] = field(default_factory=list)


def evaluate_uniedit(
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    pool_size: int,
    batch_size: int = 32,
    seed: int = 0,
    originals: Answers | None = None,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Edited, Sequence[EditRecord]], None] | None = None,
) -> Evaluation:
    """Edit the records a pool at a time, each pool from the unedited backbone, and judge by UniEdit's protocol.

    Pools, `own_edit_only`, `originals`, `progress` and `look` are as in `modules.evaluation.evaluate`. The seconds
    spent on hops count as answering.

    Against the released code: locality is left out for collisions within a pool, not within all records at once; all
    hops of a question are looked at before the first of them is edited in, and are then made in one call.

    Raises:
        ValueError: without records or with a pool size below 1; and whatever the editor raises.
    """
    pools, dropped = split_pools(records, pool_size)
    originals = originals or Answers(Edited(backbone))
    cases: list[_Case] = []
    made: set[str] = set()
    edit_seconds = answer_seconds = 0.0
    for pool in pools:
        of_pool = [_case(record, n) for record, n in zip(*without_known_facts(pool), strict=True)]
        _ask_unedited(originals, of_pool, batch_size)
        for group in [[case] for case in of_pool] if editor.own_edit_only else [of_pool]:
            requests = [request for case in group for request in case.record.requests]
            start = now(backbone)
            with editor.edit(backbone, requests) as edited:
                ready = now(backbone)
                _judge(edited, originals, group, batch_size)
                waiting = _with_hops(edited, group, batch_size, made)
                if look:
                    look(edited, [case.record for case in group])
            for hops, asked in waiting.items():  # not within the first edit, which may live in the same modules
                with editor.edit(backbone, [*requests, *hops]) as edited:
                    _answer(edited, asked, batch_size)
                made.add("together")
            edit_seconds += ready - start
            answer_seconds += now(backbone) - ready
            if progress:
                progress(len(group))
        cases += of_pool
    results = [_result(case) for case in cases]
    failed = [len(asked.failed) for case in cases for asked in case.asked]
    settings = {
        "protocol": "uniedit",
        "batch_size": batch_size,
        "own_edit_only": editor.own_edit_only,
        "pools": len(pools),
        "records": len(results),
        "records_dropped": dropped,
        "queries_left_out": sum(case.left_out for case in cases),
        "queries_with_unknown_hops": sum(map(bool, failed)),
        "hops_edited": sum(failed),
        "hops_made": " and ".join(sorted(made)) or "none",
        "bootstrap_seed": seed,
    }
    aggregates = summarise(results, seed=seed, values=uniedit_values)
    return Evaluation(editor.name, len(pools[0]), results, aggregates, edit_seconds, answer_seconds, settings)


def uniedit_values(answers: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value of one record, the mean over its questions, from the `post` of a result."""
    found = {"reliability/token_accuracy": list(answers["rewrite_acc"])}
    for sort in ("generality", "locality", "portability", "multi_hop"):
        for asked in answers.get(sort, []):
            for name in (sort, *(f"{sort}/{criterion}" for criterion in asked["criteria"])):
                found.setdefault(f"{name}/uniedit_top_{TOP}", []).append(asked["acc"])
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def without_known_facts(records: Sequence[EditRecord]) -> tuple[list[EditRecord], list[int]]:
    """Leave out locality questions that rest on the fact of one of the records' edits, in either direction.

    Where an edit names no fact, which questions it touches is told by names: see `without_collisions`.

    Returns:
        The records without those questions, and how many each of them lost.
    """
    facts = [request.fact for record in records for request in record.requests]
    if None in facts:
        return without_collisions(records)
    edited = {frozenset(fact) for fact in facts if fact}
    kept, left_out = [], []
    for record in records:
        locality = {
            kind: tuple(q for q in queries if not any(h.fact and frozenset(h.fact) in edited for h in q.hops))
            for kind, queries in record.locality.items()
        }
        kept.append(replace(record, locality=locality))
        left_out.append(sum(len(queries) - len(locality[kind]) for kind, queries in record.locality.items()))
    return kept, left_out


def _case(record: EditRecord, left_out: int) -> _Case:
    case = _Case(record, left_out)
    case.asked = [_Asked("generality", q, q.criteria or ("Rep",)) for q in record.rephrases]
    for kind, queries in record.portability.items():
        case.asked += [_Asked("generality" if q.criteria else "portability", q, q.criteria or (kind,)) for q in queries]
    case.asked += [_Asked("multi_hop", q, q.criteria) for q in record.multi_hop]
    for kind, queries in record.locality.items():
        case.asked += [_Asked("locality", q, q.criteria or (kind,)) for q in queries]
    return case


def _ask_unedited(originals: Answers, cases: Sequence[_Case], batch_size: int) -> None:
    pairs = dict.fromkeys(
        (a.query.prompt, a.query.target) for case in cases for a in case.asked if a.sort == "locality"
    )
    pairs = [pair for pair in pairs if pair not in originals.scores]
    originals.scores |= _scores(originals.model, pairs, batch_size, 0)


def _judge(edited: Edited, originals: Answers, cases: Sequence[_Case], batch_size: int) -> None:
    """Reliability, locality, which hops are unknown, and the generality of questions that have none."""
    every = [asked for case in cases for asked in case.asked]
    hops = [hop for asked in every if asked.sort != "locality" for hop in asked.query.hops]
    edits = [r for case in cases for r in case.record.requests if r.target]
    pairs = [(r.prompt, r.target) for r in (*hops, *edits)]
    pairs += [(a.query.prompt, a.query.target) for a in every if a.sort == "locality"]
    scores = _scores(edited, pairs, batch_size)
    for case in cases:
        own = [scores[r.prompt, r.target] for r in case.record.requests if r.target]
        case.reliability = [round(score.accuracy, 6) for score in own if len(score.target)]
    for asked in every:
        pair = asked.query.prompt, asked.query.target
        if asked.sort == "locality":
            asked.share = kept(scores[pair], originals.scores[pair], edited.backbone.tokenizer, asked.top)
        else:
            asked.failed = tuple(hop for hop in asked.query.hops if within(scores[hop.prompt, hop.target]) != 1.0)
    _answer(edited, [asked for asked in every if asked.sort != "locality" and not asked.failed], batch_size)


def _with_hops(
    edited: Edited, cases: Sequence[_Case], batch_size: int, made: set[str]
) -> dict[tuple[EditRequest, ...], list[_Asked]]:
    """Answer what rests on unknown hops with those edited in on top; what is left, where the editor cannot do so."""
    waiting: dict[tuple[EditRequest, ...], list[_Asked]] = {}
    for asked in (a for case in cases for a in case.asked if a.failed):
        waiting.setdefault(asked.failed, []).append(asked)
    for hops in list(waiting):
        with ExitStack() as stack:
            try:
                further = stack.enter_context(edited.edit(hops))
            except NotImplementedError:
                break
            _answer(further, waiting.pop(hops), batch_size)
            made.add("further")
    return waiting


def _answer(edited: Edited, asked: Sequence[_Asked], batch_size: int) -> None:
    scores = _scores(edited, [(a.query.prompt, a.query.target) for a in asked], batch_size)
    for a in asked:
        a.share = within(scores[a.query.prompt, a.query.target], a.top)


def _scores(
    model: Edited, pairs: Sequence[tuple[str, str]], batch_size: int, top_k: int = TOP
) -> dict[tuple[str, str], TargetScore]:
    distinct = list(dict.fromkeys(pairs))
    if not distinct:
        return {}
    prompts, targets = map(list, zip(*distinct, strict=True))
    return dict(zip(distinct, model.score(prompts, targets, batch_size, top_k), strict=True))


def within(score: TargetScore, top: int = TOP) -> float | None:
    """Share of a target's tokens that are among the `top` most probable ones; None without a token to predict."""
    if not len(score.target):
        return None
    return round(float((score.top[:, :top] == score.target[:, None]).any(1).float().mean()), 6)


def kept(score: TargetScore, original: TargetScore, tokenizer: PreTrainedTokenizerBase, top: int = TOP) -> float | None:
    """Share of places at which the unedited model's token is, as a string, among the edited model's `top`.

    None without a token to predict. Where one of the two has no prediction for a text's very first token, the places
    that both have are compared.
    """
    n = min(len(score.top), len(original.predicted))
    if not n:
        return None
    rows = zip(score.top[-n:, :top].tolist(), original.predicted[-n:].tolist(), strict=True)
    found = [tokenizer.decode([was]) in [tokenizer.decode([token]) for token in now_likely] for now_likely, was in rows]
    return round(sum(found) / n, 6)


def _result(case: _Case) -> dict[str, Any]:
    return {
        "case_id": case.record.id,
        "requested_rewrite": rewrite(case.record),
        "post": {"rewrite_acc": case.reliability} | dict(_by_sort(case)),
        "left_out": case.left_out,
    }


def _by_sort(case: _Case) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for sort in ("generality", "locality", "portability", "multi_hop"):
        scored = [a for a in case.asked if a.sort == sort and a.share is not None]
        if scored:
            yield (
                sort,
                [
                    {"prompt": a.query.prompt, "criteria": list(a.criteria), "acc": a.share}
                    | ({"hops": len(a.query.hops), "hops_edited": len(a.failed)} if sort != "locality" else {})
                    for a in scored
                ],
            )
