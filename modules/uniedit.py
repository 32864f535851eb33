"""UniEdit's protocol: answers among the five most probable tokens, and hops that a model does not know edited in first.

Source: Chen et al. 2025, arXiv 2505.12345, and its released evaluation. A question that follows from an edit often
rests on other facts too. UniEdit asks for those first, edits in the ones that the edited model does not know, puts its
question, and takes them back. Any records can be judged so: the IBKE paper reports all its data sets by this protocol.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from modules.editor import Edited, TargetScore
from modules.evaluation import Answers, without_collisions
from modules.judging import Case, Judge, Make, rewrite, thinned
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
        made: how these were edited in: further, on top of the edits, or together with them.
        share: the score, or None where there was nothing to predict.
    """

    sort: str
    query: Query
    criteria: tuple[str, ...]
    failed: tuple[EditRequest, ...] = ()
    made: str = ""
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


class UniEdit(Judge):
    """UniEdit's protocol. The seconds spent on hops count as answering.

    Against the released code: locality is left out for collisions within a pool, not within all records at once; all
    hops of a question are looked at before the first of them is edited in, and are then made in one call; a figure is a
    mean over records, not the released `mean_acc`, which is one over the data's sub-metrics, each over its questions.

    Args:
        originals: the unedited model's answers, kept over calls.
    """

    name = "uniedit"
    definitions = UNIEDIT_PROTOCOLS

    def __init__(self, originals: Answers, batch_size: int = 32) -> None:
        self.originals, self.batch_size = originals, batch_size

    def cases(self, records: Sequence[EditRecord]) -> list[Case]:
        return thinned(records, *without_known_facts(records))

    def ask_unedited(self, cases: Sequence[Case]) -> None:
        _ask_unedited(self.originals, [_case(case) for case in cases], self.batch_size)

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        found = [_case(case) for case in cases]
        _judge(edited, self.originals, found, self.batch_size)
        _with_hops(edited, found, self.batch_size)
        return found

    def results(self, found: list[Any], make: Make) -> list[dict[str, Any]]:
        for hops, asked in _waiting(found).items():
            with make(hops) as edited:
                _answer(edited, asked, self.batch_size)
            _made(asked, "together")
        return [_result(case) for case in found]

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        return uniedit_values(post)

    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        return summarise(results, seed, values=uniedit_values)

    def options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size}

    def counts(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        asked = [a for r in results for of in r["post"].values() for a in of if isinstance(a, dict)]
        failed = [a["hops_edited"] for a in asked if a.get("hops_edited")]
        made = {how for r in results for how in r["hops_made"]}
        return {
            "queries_with_unknown_hops": len(failed),
            "hops_edited": sum(failed),
            "hops_made": " and ".join(sorted(made)) or "none",
        }


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


def _case(given: Case) -> _Case:
    record = given.record
    case = _Case(record, given.left_out)
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


def _with_hops(edited: Edited, cases: Sequence[_Case], batch_size: int) -> None:
    """Answer what rests on unknown hops with those edited in on top, where the editor can do so."""
    for hops, asked in _waiting(cases).items():
        with ExitStack() as stack:
            try:
                further = stack.enter_context(edited.edit(hops))
            except NotImplementedError:
                break
            _answer(further, asked, batch_size)
            _made(asked, "further")


def _waiting(cases: Sequence[_Case]) -> dict[tuple[EditRequest, ...], list[_Asked]]:
    """The questions whose unknown hops are not edited in yet, by these."""
    waiting: dict[tuple[EditRequest, ...], list[_Asked]] = {}
    for asked in (a for case in cases for a in case.asked if a.failed and not a.made):
        waiting.setdefault(asked.failed, []).append(asked)
    return waiting


def _made(asked: Sequence[_Asked], how: str) -> None:
    for one in asked:
        one.made = how


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
        "hops_made": sorted({a.made for a in case.asked if a.made}),
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
