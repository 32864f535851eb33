"""zsRE's protocol as ROME, MEMIT and DistillMIKE report it: does the model say the target, token by token?

Sources: Meng et al. 2022 (MEMIT, arXiv 2210.07229) and its released evaluation; Qiao et al. 2024 (DistillMIKE),
appendix J, equations 16 and 17. The papers write of the argmax alone; the released code asks for each token of the
target after the prompt and the tokens before it, which is what is measured here.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from datamodules.records import EditRecord
from modules.editor import TargetScore
from modules.published import Pair, Published

_NQ_MARK = "nq question: "
_SHARE = (
    "share of the target's tokens that are the argmax after the prompt and the target's tokens before them. Over all "
    "tokens of a record's prompts, then the mean over records."
)
ZSRE_PROTOCOLS: dict[str, str] = {
    "zsre/score": "Harmonic mean of efficacy, paraphrase and specificity, each a mean over records; 0 where one of "
    "them is 0. Its interval resamples records.",
    "zsre/efficacy": "At the edits' own questions: " + _SHARE,
    "zsre/paraphrase": "At rephrased questions: " + _SHARE,
    "zsre/specificity": "At unrelated questions, against gold answers that the unedited model need not know (compare "
    f"with its row): {_SHARE} Questions of kind nq are put as MEMIT puts them, 'nq question: ...?'; those that name "
    "the subject of another edit are asked too.",
}


class Zsre(Published):
    """Efficacy, paraphrase, specificity, and their harmonic mean.

    Their authors edit towards the true answer (`target: answer` of the reader, or a file whose `alt` is the true one).
    A character that several tokens share is compared by those tokens, where MEMIT's code compares a stand-in for it.
    """

    name = "zsre"
    score = "zsre/score"
    parts = ("zsre/efficacy", "zsre/paraphrase", "zsre/specificity")
    definitions = ZSRE_PROTOCOLS

    def lacks(self, record: EditRecord) -> str:
        if not all(request.prompt.strip() and request.target for request in record.requests):
            return "needs edits with a prompt and a target, not free text"
        near = [query for queries in record.locality.values() for query in queries]
        if not record.rephrases or not near:
            return f"has no {'locality queries' if record.rephrases else 'rephrases'}; read zsRE files that have `loc`"
        empty = any(not query.prompt.strip() for query in (*record.rephrases, *near))
        return "asks a query without a prompt" if empty else ""

    def pairs(self, record: EditRecord) -> list[Pair]:
        return [pair for pairs in _pairs(record).values() for pair in pairs]

    def judge(self, record: EditRecord, scores: Mapping[Pair, TargetScore]) -> dict[str, Any]:
        """MEMIT's shape: for each sort of prompts a list with a truth value per token of their targets."""
        return {
            f"{sort}_prompts_correct": [hit for pair in pairs for hit in _hits(scores[pair])]
            for sort, pairs in _pairs(record).items()
        }

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        sorts = ("rewrite", "paraphrase", "neighborhood")
        hits = [post[f"{sort}_prompts_correct"] for sort in sorts]
        return {name: sum(found) / len(found) for name, found in zip(self.parts, hits, strict=True)}


ZSRE = Zsre()


def _pairs(record: EditRecord) -> dict[str, list[Pair]]:
    return {
        "rewrite": [(request.prompt, request.target) for request in record.requests],
        "paraphrase": [(query.prompt, query.target) for query in record.rephrases],
        "neighborhood": [
            (f"{_NQ_MARK}{query.prompt.rstrip(' ?')}?" if kind == "nq" else query.prompt, query.target)
            for kind, queries in record.locality.items()
            for query in queries
        ],
    }


def _hits(score: TargetScore) -> Iterable[bool]:
    return (score.predicted == score.target).tolist()
