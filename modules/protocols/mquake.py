"""MQuAKE's protocol: few-shot answers to multi-hop questions, any of three, beside InComeS's score of the same cases.

Source: Zhong et al. 2023, arXiv 2305.14795, section 3.3, and the evaluation notes of its repository. Edited facts are
asked by their own cloze without demonstrations, unedited facts and multi-hop questions after demonstrations.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datamodules.readers.mquake import HOP, conflicting, unedited
from datamodules.records import EditRecord
from modules.editor import Edited
from modules.evaluation import Answers
from modules.judging import Case, Judge, rewrite
from modules.metrics import PROTOCOLS, exact_match, summarise
from modules.protocols.few_shot import FewShot
from modules.protocols.text import first_line, generated

MEASURES = (
    "reliability/mquake_edit_wise",
    "single_hop/mquake_instance_wise",
    "multi_hop/mquake_accuracy",
    "multi_hop/token_accuracy_max",
)
MQUAKE_PROTOCOLS: dict[str, str] = {
    "reliability/mquake_edit_wise": "Share of a case's edits whose cloze is continued, greedily and without "
    "demonstrations, by the new target or an alias of it (MQuAKE's edit-wise success; published over edits, here a "
    "mean over cases).",
    "single_hop/mquake_instance_wise": "1 where every fact of the case's new chain is known: the edited ones as above, "
    "the unedited ones by question after eight demonstrations of their relation (MQuAKE's instance-wise accuracy).",
    "multi_hop/mquake_accuracy": "1 where the greedy answer to any of the case's three questions, after MQuAKE's (or "
    "this project's) demonstrations, is the new answer or an alias of it, letter by letter but for a full stop at the "
    "end (MQuAKE's multi-hop accuracy).",
    "multi_hop/token_accuracy_max": PROTOCOLS["multi_hop/token_accuracy_max"],
    "<sort>/<n>_hops/<measure>": "The same over the cases with a chain of so many hops.",
    "<sort>/<n>_edits/<measure>": "The same over the cases with so many edits (1_edit, 2_edits, ...).",
}
_DEFAULT = FewShot()


class MQuAKE(Judge):
    """MQuAKE's protocol. The unedited model is not asked, since nothing is measured against it.

    All edits of a pool are made, but a case that rests on a hop which another case of its pool edits to something else
    is not asked (see `datamodules.readers.mquake.conflicting`): it has no right answer. Pools of 1 ask every case.

    Args:
        few_shot: the demonstrations; see `datamodules.readers.mquake.read_few_shot`.
        max_new_tokens: length of an answer; by default 16, and 128 after a chain of thought.
        conflicts: ask the contradicted cases too.
    """

    name = "mquake"
    definitions = MQUAKE_PROTOCOLS

    def __init__(
        self,
        few_shot: FewShot = _DEFAULT,
        batch_size: int = 32,
        max_new_tokens: int | None = None,
        conflicts: bool = False,
    ) -> None:
        self.few_shot, self.batch_size, self.max_new_tokens = few_shot, batch_size, max_new_tokens
        self.conflicts = conflicts

    def check(self, records: Iterable[EditRecord]) -> None:
        check_mquake(records)

    def cases(self, records: Sequence[EditRecord]) -> list[Case]:
        against = conflicting(records)
        return [Case(r, 0, out, self.conflicts or not out) for r, out in zip(records, against, strict=True)]

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        return _judged(edited, [c.record for c in cases], self.few_shot, self.max_new_tokens, self.batch_size)

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        return mquake_values(post)

    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        return summarise(results, seed, values=mquake_values)

    def options(self) -> dict[str, Any]:
        options = {
            "demonstrations": "own" if self.few_shot.multi_hop == _DEFAULT.multi_hop else "given",
            "demonstrations_by_relation": len(self.few_shot.relations),
            "chain_of_thought": self.few_shot.thinks,
            "conflicts": self.conflicts,
            "batch_size": self.batch_size,
        }
        return options if self.few_shot == _DEFAULT else options | {"demonstrations_hash": self.few_shot.digest}


def check_mquake(records: Iterable[EditRecord]) -> None:
    """Refuse records that the protocol cannot judge.

    Raises:
        ValueError: names the first one.
    """
    for record in records:
        if not record.multi_hop:
            raise ValueError(f"--protocol mquake: record {record.id!r} has no multi-hop questions; read MQuAKE")


def mquake_values(answers: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value of one case, from the `post` of a result."""
    columns = (
        (MEASURES[0], answers["rewrite_em"], lambda hits: sum(hits) / len(hits)),
        (MEASURES[1], answers["single_hop_em"], min),
        (MEASURES[2], answers["multi_hop_em"], max),
        (MEASURES[3], answers["multi_hop_acc"], max),
    )
    values = {}
    for name, found, together in columns:
        if found:
            sort, measure = name.split("/")
            for place in (sort, *(f"{sort}/{criterion}" for criterion in answers["criteria"])):
                values[f"{place}/{measure}"] = float(together(found))
    return values


def same_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is one of the answers, but for white space and a full stop at the end."""
    return text.strip().rstrip(".") in {answer.strip().rstrip(".") for answer in answers}


def _judged(
    edited: Edited, cases: Sequence[EditRecord], few_shot: FewShot, max_new_tokens: int | None, batch_size: int
) -> list[dict[str, Any]]:
    short = max_new_tokens or 16
    clozes = [request.prompt for case in cases for request in case.requests if request.target]
    hops = [few_shot.ask_hop(hop.prompt) for case in cases for hop in unedited(case)]
    texts = generated(edited, [*clozes, *hops], short, batch_size)
    questions = [few_shot.ask(query.prompt) for case in cases for query in case.multi_hop]
    long = max_new_tokens or (128 if few_shot.thinks else 16)
    said = {prompt: few_shot.answer(text) for prompt, text in generated(edited, questions, long, batch_size).items()}
    forced = Answers(edited)
    forced.ask([replace(case, rephrases=(), locality={}, portability={}) for case in cases], batch_size=batch_size)
    return [_result(case, few_shot, texts, said, forced) for case in cases]


def _result(
    case: EditRecord, few_shot: FewShot, texts: Mapping[str, str], said: Mapping[str, str], forced: Answers
) -> dict[str, Any]:
    aliases = {answer: hop.answers for hop in reversed(case.portability.get(HOP, ())) for answer in hop.answers[:1]}
    recalled = [
        float(exact_match(texts[request.prompt], (request.target, *aliases.get(request.target, ()))))
        for request in case.requests
        if request.target
    ]
    known = [float(same_answer(first_line(texts[few_shot.ask_hop(hop.prompt)]), hop.answers)) for hop in unedited(case)]
    answered = [said[few_shot.ask(query.prompt)] for query in case.multi_hop]
    criteria = case.multi_hop[0].criteria
    post = {
        "rewrite_em": recalled,
        "single_hop_em": recalled + known if _whole_chain(case) else [],
        "multi_hop_em": [float(same_answer(a, q.answers)) for a, q in zip(answered, case.multi_hop, strict=True)],
        "multi_hop_acc": [
            round(max(forced.scores[query.prompt, answer].accuracy for answer in query.answers), 6)
            for query in case.multi_hop
        ],
        "multi_hop_answers": answered,
        "criteria": list(criteria),
    }
    return {"case_id": case.id, "requested_rewrite": rewrite(case), "post": post}


def _whole_chain(case: EditRecord) -> bool:
    """Whether all hops are there: a case may have been read with fewer queries of each kind."""
    return f"{len(case.portability.get(HOP, ()))}_hops" in case.multi_hop[0].criteria
