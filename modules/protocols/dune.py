"""DUNE's protocol: generated answers, judged by a rule of each set, beside InComeS's score of the same questions.

Source: Akyürek et al. 2023, DUnE, and its released evaluation; the rules are in `dune_answers`. The prompts are this
project's own: a base model needs to be told where the answer begins.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datamodules.readers.dune import SETS
from datamodules.records import EditRecord, Query
from modules.editor import Edited
from modules.evaluation import Answers
from modules.judging import Case, Judge, rewrite
from modules.metrics import PROTOCOLS, summarise
from modules.protocols.dune_answers import gives, reading
from modules.protocols.text import generated

STEREOTYPED = ("debiasing_I", "debiasing_II")
DUNE_PROTOCOLS: dict[str, str] = {
    "portability/dune_accuracy": "Share of an edit's questions that are answered rightly, greedily and without "
    "demonstrations: the letter of the right choice (new_info, scientific), the sum's result (arithmetic).",
    "portability/dune_stereotyped": "Share of an edit's questions that get the stereotyped answer, which the edit is "
    "against: lower is better (debiasing_I: it names the same person or group; debiasing_II: the same yes or no). Of a "
    "long answer counts what it states, not the reasons that follow.",
    "portability/<set>/<measure>": "The same over one set.",
    "portability/token_accuracy": PROTOCOLS["portability/token_accuracy"] + " As InComeS scores DUNE: at the bare "
    "question, of the line of the right choice; in the debiasing sets of the stereotyped answer.",
    "locality/dune_agreement": "Share of the set's locality questions to which the edited and the unedited model, "
    "both generating, give the same answer by the set's rule, right or wrong.",
    "locality/dune_accuracy": "Share of the same questions that get the published answer, which the unedited model "
    "need not know: compare with the unedited model's row.",
    "locality/<set>/<measure>": "The same over one set.",
}
_FORM = "Question: {question}\n{hint}Answer:"
_HINTS = {
    "new_info": "Reply with the letter of the right choice only.\n",
    "scientific": "Reply with the letter of the right choice only.\n",
    "arithmetic": "Reply with a number only.\n",
    "debiasing_II": "Reply with yes, no or maybe.\n",
}
_Asked = tuple[str, str, Query]  # portability or locality, the set, the question


class Dune(Judge):
    """DUNE's protocol. Each record's questions must be of kinds that are sets of DUNE, as its reader reads them.

    Args:
        originals: the unedited model's answers, kept over calls.
        max_new_tokens: length of an answer; the released code's 20 by default.
    """

    name = "dune"
    definitions = DUNE_PROTOCOLS

    def __init__(self, originals: Answers, batch_size: int = 32, max_new_tokens: int = 20) -> None:
        self.originals, self.batch_size, self.max_new_tokens = originals, batch_size, max_new_tokens

    def check(self, records: Iterable[EditRecord]) -> None:
        check_dune(records)

    def ask_unedited(self, cases: Sequence[Case]) -> None:
        _ask_unedited(self.originals, [case.record for case in cases], self.max_new_tokens, self.batch_size)

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        return _judged(edited, self.originals, [c.record for c in cases], self.max_new_tokens, self.batch_size)

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        return dune_values(post)

    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        return summarise(results, seed, values=dune_values)

    def options(self) -> dict[str, Any]:
        return {"batch_size": self.batch_size, "max_new_tokens": self.max_new_tokens}


def check_dune(records: Iterable[EditRecord]) -> None:
    """Refuse records that the protocol cannot judge.

    Raises:
        ValueError: names the first one.
    """
    for record in records:
        kinds = [kind for _, kind, _ in _asked(record)]
        wrong = next((kind for kind in kinds if kind not in SETS), None)
        if wrong or not kinds:
            found = f"has questions of kind {wrong!r}, which is no set of DUNE" if wrong else "has no questions"
            raise ValueError(f"--protocol dune: record {record.id!r} {found}; read DUNE")


def dune_values(answers: Mapping[str, Any]) -> dict[str, float]:
    """Metric name -> value of one record, the mean over its questions, from the `post` of a result."""
    found: dict[str, list[float]] = {}
    for asked in answers["portability"]:
        measure = "dune_stereotyped" if asked["set"] in STEREOTYPED else "dune_accuracy"
        _add(found, "portability", asked["set"], measure, asked["gives"])
        if asked["acc"] is not None:
            _add(found, "portability", asked["set"], "token_accuracy", asked["acc"])
    for asked in answers["locality"]:
        _add(found, "locality", asked["set"], "dune_agreement", asked["agrees"])
        _add(found, "locality", asked["set"], "dune_accuracy", asked["gives"])
    return {name: sum(values) / len(values) for name, values in found.items()}


def _add(found: dict[str, list[float]], sort: str, kind: str, measure: str, value: float) -> None:
    for place in (sort, f"{sort}/{kind}"):
        found.setdefault(f"{place}/{measure}", []).append(value)


def prompted(sort: str, kind: str, query: Query) -> str:
    """A question as it is put to a model; debiasing_II's locality questions say themselves what to reply."""
    hint = "" if sort == "locality" and kind == "debiasing_II" else _HINTS.get(kind, "")
    return _FORM.format(question=query.prompt, hint=hint)


def _asked(record: EditRecord) -> list[_Asked]:
    return [
        (sort, kind, query)
        for sort, kinds in (("portability", record.portability), ("locality", record.locality))
        for kind, queries in kinds.items()
        for query in queries
    ]


def _ask_unedited(originals: Answers, records: Sequence[EditRecord], max_new_tokens: int, batch_size: int) -> None:
    asked = [one for record in records for one in _asked(record) if one[0] == "locality"]
    prompts = [prompt for prompt in (prompted(*one) for one in asked) if prompt not in originals.texts]
    originals.texts |= generated(originals.model, prompts, max_new_tokens, batch_size)


def _judged(
    edited: Edited, originals: Answers, records: Sequence[EditRecord], max_new_tokens: int, batch_size: int
) -> list[dict[str, Any]]:
    every = [one for record in records for one in _asked(record)]
    texts = generated(edited, [prompted(*one) for one in every], max_new_tokens, batch_size)
    pairs = list(dict.fromkeys((query.prompt, query.target) for sort, _, query in every if sort == "portability"))
    forced = edited.score([p for p, _ in pairs], [t for _, t in pairs], batch_size) if pairs else []
    accuracy = {
        pair: round(score.accuracy, 6) if len(score.target) else None for pair, score in zip(pairs, forced, strict=True)
    }
    results = []
    for record in records:
        post: dict[str, list[dict[str, Any]]] = {"portability": [], "locality": []}
        for sort, kind, query in _asked(record):
            prompt = prompted(sort, kind, query)
            text = texts[prompt]
            judged = {"set": kind, "prompt": query.prompt, "answer": text, "gives": float(gives(kind, text, query))}
            if sort == "portability":
                judged["acc"] = accuracy[query.prompt, query.target]
            else:
                same = reading(kind, text, query) == reading(kind, originals.texts[prompt], query)
                judged["agrees"] = float(same)
            post[sort].append(judged)
        results.append({"case_id": record.id, "requested_rewrite": rewrite(record), "post": post})
    return results
