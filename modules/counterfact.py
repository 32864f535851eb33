"""CounterFact's protocol: is the new target more probable than the old one, and at its neighbours the other way round?

Sources: Meng et al. 2022 (ROME, arXiv 2202.05262; MEMIT, arXiv 2210.07229) and their released evaluation; Qiao et al.
2024 (DistillMIKE), appendix J, equations 18 to 21. All name a target's probability without saying of how many tokens;
the released code of all takes exp(-mean NLL of its tokens), so targets of different lengths can be compared.
DistillMIKE's code puts "Prompt: " before every query; here it is asked as it stands, as ROME and MEMIT do. Fluency (GE)
and consistency (RS) of what the model writes are ROME's too, and measured on request, since writing takes time.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datamodules.records import EditRecord
from modules.editor import Edited, TargetScore
from modules.fluency import CONSISTENCY, FLUENCY, FLUENCY_PROTOCOLS, References, written
from modules.judging import Case
from modules.published import Pair, Published

_P = (
    "p is a whole target's probability after the prompt, teacher-forced: exp(-mean NLL of its tokens). Mean over a "
    "record's prompts, then over records; prompts that name the subject of another edit are asked too."
)
_MAGNITUDE = _P + " No measure of quality: see the score of the same prompts."
COUNTERFACT_PROTOCOLS: dict[str, str] = {
    "counterfact/S": "Harmonic mean of ES, PS and NS, each a mean over records; 0 where one of them is 0. Its interval "
    "resamples records.",
    "counterfact/ES": "Efficacy score: share of the edits' own prompts at which p(new target) > p(old target). " + _P,
    "counterfact/EM": "Efficacy magnitude: mean of p(new target) - p(old target) at the same prompts. " + _MAGNITUDE,
    "counterfact/PS": "Paraphrase score: as ES, at rephrased prompts. " + _P,
    "counterfact/PM": "Paraphrase magnitude: as EM, at rephrased prompts. " + _MAGNITUDE,
    "counterfact/NS": "Neighbourhood score: share of prompts about other subjects, whose true answer is the edit's old "
    "target, at which p(old target) > p(new target). " + _P,
    "counterfact/NM": "Neighbourhood magnitude: mean of p(old target) - p(new target) at the same prompts. "
    + _MAGNITUDE,
}


class CounterFact(Published):
    """ES, PS, NS, their magnitudes EM, PM, NM, and S.

    A record needs one edit with its old target, rephrases, and locality queries of kind `neighborhood` whose answer is
    the old target. EasyEdit's shape has one rephrase and one neighbour (whose answer is the old target in all of its
    21,310 records) where ROME's has two and ten: the definitions hold for both, the figures are of different prompts.

    Args:
        fluency: let the model write on each record's generation prompts too, and measure GE (modules/fluency.py).
        references: texts about things that have the new attribute, for RS; without them there is none.
        max_tokens: of a prompt and what is written after it together; ROME's 100.
    """

    name = "counterfact"
    score = "counterfact/S"
    parts = ("counterfact/ES", "counterfact/PS", "counterfact/NS")

    def __init__(
        self, batch_size: int = 32, fluency: bool = False, references: References | None = None, max_tokens: int = 100
    ) -> None:
        super().__init__(batch_size)
        self.fluency, self.references, self.max_tokens = fluency, references, max_tokens
        written_too = FLUENCY_PROTOCOLS if references else {FLUENCY: FLUENCY_PROTOCOLS[FLUENCY]}
        self.definitions = COUNTERFACT_PROTOCOLS | (written_too if fluency else {})

    def check(self, records: Iterable[EditRecord]) -> None:
        records = list(records)
        super().check(records)
        if self.fluency and self.references and not any(map(self.references.of, records)):
            raise ValueError(
                "--references: the file has no text about the new attribute (relation and target id) of any of the "
                f"{len(records)} records; give ROME's attribute_snippets.json, or leave it out"
            )

    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        results = super().ask(edited, cases)
        if not self.fluency:
            return results
        texts = written(
            edited,
            [case.record.generation for case in cases],
            [self.references.of(case.record) for case in cases] if self.references else None,
            self.references.vectorizer if self.references else None,
            self.max_tokens,
            self.batch_size,
        )
        for result, of in zip(results, texts, strict=True):  # by the names of ROME's results
            result["post"] |= {"text": list(of.texts), "ngram_entropy": of.fluency}
            if of.consistency is not None:
                result["post"]["reference_score"] = of.consistency
        return results

    def options(self) -> dict[str, Any]:
        if not self.fluency:
            return super().options()
        known = sum(map(len, self.references.texts.values())) if self.references else 0
        return super().options() | {"fluency": True, "max_tokens": self.max_tokens, "reference_texts": known}

    def counts(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if not (self.fluency and self.references):
            return {}
        return {"records_without_references": sum("reference_score" not in r["post"] for r in results)}

    def lacks(self, record: EditRecord) -> str:
        if len(record.requests) != 1:
            return f"holds {len(record.requests)} edits; CounterFact compares the two targets of one"
        request = record.request
        if not request.prompt.strip() or not request.target or not request.old_target:
            return "needs an edit with a prompt, a target and its old target (counterfact: target_true or ground_truth)"
        near = record.locality.get("neighborhood", ())
        if not record.rephrases or not near:
            return f"has no {'neighborhood queries' if record.rephrases else 'rephrases'}; read CounterFact's own files"
        other = next((query for query in near if query.target != request.old_target), None)
        if other:
            return (
                f"has the neighbour {other.prompt!r} with the answer {other.target!r}; neighbours share the edit's old "
                f"target, {request.old_target!r}"
            )
        if self.fluency and not record.generation:
            return "has no generation prompts, which --fluency needs; read CounterFact in ROME's shape"
        empty = any(not query.prompt.strip() for query in (*record.rephrases, *near))
        return "asks a query without a prompt" if empty else ""

    def pairs(self, record: EditRecord) -> list[Pair]:
        new, old = _targets(record)
        return [(prompt, target) for of in _prompts(record).values() for prompt in of for target in (new, old)]

    def judge(self, record: EditRecord, scores: Mapping[Pair, TargetScore]) -> dict[str, Any]:
        """MEMIT's shape: for each sort of prompts a list of {target_new, target_true}, mean NLLs in nats."""
        new, old = _targets(record)
        return {
            f"{sort}_prompts_probs": [
                {"target_new": nll(scores[prompt, new]), "target_true": nll(scores[prompt, old])} for prompt in prompts
            ]
            for sort, prompts in _prompts(record).items()
        }

    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        found = {}
        for letter, sort in (("E", "rewrite"), ("P", "paraphrase"), ("N", "neighborhood")):
            right, wrong = ("target_true", "target_new") if sort == "neighborhood" else ("target_new", "target_true")
            asked = post[f"{sort}_prompts_probs"]
            found[f"counterfact/{letter}S"] = _mean([x[right] < x[wrong] for x in asked])  # NLLs: the lower is likelier
            found[f"counterfact/{letter}M"] = _mean([math.exp(-x[right]) - math.exp(-x[wrong]) for x in asked])
        of_texts = {FLUENCY: post.get("ngram_entropy"), CONSISTENCY: post.get("reference_score")}
        return found | {name: value for name, value in of_texts.items() if value is not None}


COUNTERFACT = CounterFact()


def nll(score: TargetScore) -> float:
    """Mean negative log-likelihood of a target's tokens, in nats."""
    return -float(score.log_probs.double().mean())


def _targets(record: EditRecord) -> tuple[str, str]:
    return record.request.target, record.request.old_target or ""


def _prompts(record: EditRecord) -> dict[str, list[str]]:
    return {
        "rewrite": [record.request.prompt],
        "paraphrase": [query.prompt for query in record.rephrases],
        "neighborhood": [query.prompt for query in record.locality["neighborhood"]],
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
