"""EasyEdit's, ROME's, MEMIT's and UniEdit's own definitions against this project's, on the same hand-made logits.

A model of ten words whose logits depend on the last word alone; from text to figure the code is the project's own. The
definitions are written out anew from the repositories' files, named at each, with as little of this project as can be.
Probabilities after a word, edited and unedited; what is left is shared out among the other words:

    after      edited                                               unedited
    " in"      New 0.5, France 0.2                                  France 0.6, New 0.2
    " New"     Delhi 0.6, Peru 0.125                                the same
    " near"    France 0.4, Delhi 0.15, Peru, in, by 0.1, New 0.05   Lyon 0.6
    " by"      Lyon 0.3, New, France 0.2                            France 0.6
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.counterfact import COUNTERFACT, CounterFact
from modules.editor import Edited, Editor
from modules.evaluation import Answers, TokenAccuracy
from modules.fluency import References
from modules.judging import Evaluation, evaluate_pools
from modules.uniedit import UniEdit
from modules.zsre import ZSRE
from tests.modules.protocols.scripted import Scripted, Told, figures, golden

WORDS = ["Lyon", "<pad>", " in", " near", " by", " New", " Peru", " France", " Delhi", " Lyon"]
EDITED = {
    " in": {" New": 0.5, " France": 0.2},
    " New": {" Delhi": 0.6, " Peru": 0.125},
    " near": {" France": 0.4, " Delhi": 0.15, " Peru": 0.1, " in": 0.1, " by": 0.1, " New": 0.05},
    " by": {" Lyon": 0.3, " New": 0.2, " France": 0.2},
}
UNEDITED = {
    " in": {" France": 0.6, " New": 0.2},
    " New": EDITED[" New"],
    " near": {" Lyon": 0.6},
    " by": {" France": 0.6},
}
RECORD = EditRecord(
    "lyon",
    (EditRequest("Lyon in", "New Peru", "Lyon", old_target="France"),),
    rephrases=(Query("Lyon near", ("New Peru",)), Query("Lyon by", ("New Peru",))),
    locality={
        "neighborhood": (Query("Lyon near", ("France",)), Query("Lyon by", ("France",))),
        "far": (Query("Lyon in", ("New Peru",)),),
    },
    portability={"hop": (Query("Lyon in", ("New Delhi",)),)},
)


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_next")  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", padding_side="left")


TOKENIZER = _tokenizer()


def table(said: Mapping[str, Mapping[str, float]]) -> Tensor:
    """Logits [last word, next word]: log-probabilities and a constant, which a softmax takes away."""
    rows = []
    for word in WORDS:
        known = said.get(word, {})
        rest = (1 - sum(known.values())) / (len(WORDS) - len(known))
        rows.append([math.log(known.get(other, rest)) + 3 for other in WORDS])
    return torch.tensor(rows)


class LastWord(Edited):
    def __init__(self, logits: Tensor) -> None:
        config = SimpleNamespace(max_position_embeddings=None)
        model = SimpleNamespace(device=torch.device("cpu"), tokenizer=TOKENIZER, logits=lambda hidden: hidden)
        model.model = SimpleNamespace(config=config)
        super().__init__(cast(Backbone, model))
        self.table = logits

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        return SimpleNamespace(last_hidden_state=self.table[ids]), None


class Changed(Editor):
    name = "changed"

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        yield LastWord(table(EDITED))


def evaluated(judge: Any) -> Evaluation:
    return evaluate_pools(judge, Changed(), LastWord(table(UNEDITED)).backbone, [RECORD], 1)


def originals() -> Answers:
    return Answers(LastWord(table(UNEDITED)))


def easyedit_answers(logits: Tensor, prompt: str, target: str) -> tuple[list[int], list[int]]:
    """Argmax and label of each target token (EasyEdit, easyeditor/evaluate/evaluate_utils.py, test_prediction_acc)."""
    ids = TOKENIZER(f"{prompt} {target}")["input_ids"]
    start = len(TOKENIZER(prompt)["input_ids"])
    return logits[ids].argmax(-1).tolist()[start - 1 : -1], ids[start:]


def easyedit_accuracy(prompt: str, target: str) -> float:
    return float(np.mean(np.equal(*easyedit_answers(table(EDITED), prompt, target))))


def easyedit_locality(prompt: str, target: str) -> float:
    """Of the same answers before and after (EasyEdit, easyeditor/editors/editor.py, edit_evaluation)."""
    before, after = (easyedit_answers(table(said), prompt, target)[0] for said in (UNEDITED, EDITED))
    return float(np.mean(np.equal(before, after)))


def test_token_accuracy_and_locality_are_easyedits() -> None:
    """By hand: after " in" and " New" come New and Delhi, so New Peru is half right and New Delhi right. After " near"
    and " by" come France and Lyon, so New Peru is wrong there at both of its tokens; before the edit Lyon and France
    came there, so neither agrees, though France is right after " near". Of New Peru after " in" and " New" the argmax
    was France and is New; it is Delhi as before."""
    found = evaluated(TokenAccuracy(originals())).records[0]["post"]
    assert found["rewrite_acc"] == [easyedit_accuracy("Lyon in", "New Peru")] == [0.5]
    rephrased = [easyedit_accuracy(query.prompt, query.target) for query in RECORD.rephrases]
    assert found["rephrase_acc"] == rephrased == [0.0, 0.0]
    assert found["portability"] == {"hop_acc": [easyedit_accuracy("Lyon in", "New Delhi")]} == {"hop_acc": [1.0]}
    near = [easyedit_locality(query.prompt, query.target) for query in RECORD.locality["neighborhood"]]
    far = [easyedit_locality(query.prompt, query.target) for query in RECORD.locality["far"]]
    assert found["locality"] == {"neighborhood_acc": near, "far_acc": far}
    assert (near, far) == ([0.0, 0.0], [0.5])


def memit_nll(prompt: str, target: str) -> float:
    """Mean NLL of a target's tokens (MEMIT, experiments/py/eval_utils_counterfact.py, test_batch_prediction; ROME's
    file of that name has it too)."""
    ids = TOKENIZER(f"{prompt} {target}")["input_ids"]
    start, own = len(TOKENIZER(prompt)["input_ids"]), TOKENIZER(f" {target}")["input_ids"]
    log_probs = table(EDITED)[ids].log_softmax(-1)
    return -sum(log_probs[start + j - 1, token].item() for j, token in enumerate(own)) / len(own)


def test_probability_comparison_is_romes() -> None:
    """By hand, New Peru and France: own prompt sqrt(0.5 * 0.125) = 0.25 and 0.2: won. " near" sqrt(0.05 * 0.125)
    = 0.079057 and 0.4: as a rephrase lost, as a neighbour won. " by" sqrt(0.2 * 0.125) = 0.158114 and 0.2: likewise."""
    evaluation = evaluated(COUNTERFACT)
    post = evaluation.records[0]["post"]
    asked = {"rewrite": ["Lyon in"], "paraphrase": ["Lyon near", "Lyon by"], "neighborhood": ["Lyon near", "Lyon by"]}
    memit = {
        sort: [{"target_new": memit_nll(p, "New Peru"), "target_true": memit_nll(p, "France")} for p in prompts]
        for sort, prompts in asked.items()
    }
    for sort, rows in memit.items():
        assert post[f"{sort}_prompts_probs"] == [pytest.approx(row, rel=1e-5) for row in rows]
    # MEMIT, experiments/summarize.py, main: the same of each sort, neighbours the other way round
    scores, magnitudes = {}, {}
    for letter, sort in (("E", "rewrite"), ("P", "paraphrase"), ("N", "neighborhood")):
        sign = -1 if sort == "neighborhood" else 1
        scores[f"{letter}S"] = np.mean([sign * (x["target_true"] - x["target_new"]) > 0 for x in memit[sort]])
        gaps = [np.exp(-x["target_new"]) - np.exp(-x["target_true"]) for x in memit[sort]]
        magnitudes[f"{letter}M"] = sign * np.mean(gaps)
    found = {name.removeprefix("counterfact/"): value for name, value in figures(evaluation).items()}
    assert {name: found[name] for name in scores} == scores == {"ES": 1.0, "PS": 0.0, "NS": 1.0}
    assert {name: found[name] for name in magnitudes} == pytest.approx(magnitudes, rel=1e-5)
    by_hand = {"EM": 0.05, "PM": (0.079057 - 0.4 + 0.158114 - 0.2) / 2, "NM": (0.4 - 0.079057 + 0.2 - 0.158114) / 2}
    assert magnitudes == pytest.approx(by_hand, abs=1e-6)
    assert found["S"] == 0.0  # the harmonic mean with a 0


def test_zsre_is_memits() -> None:
    """By hand: New Peru after " in" is right, wrong; after " near" and " by" wrong twice. France is the argmax after
    " near" and not after " by". Of unrelated questions all kinds count alike."""

    def memit(prompt: str, target: str) -> list[bool]:
        """Each token asked for alone, after the tokens before it (MEMIT, experiments/py/eval_utils_zsre.py,
        compute_rewrite_quality_zsre and test_batch_prediction_acc)."""
        own, hits = TOKENIZER(f" {target}")["input_ids"], []
        for i, token in enumerate(own):
            text = prompt + "".join(WORDS[known] for known in own[:i])
            hits.append(int(table(EDITED)[TOKENIZER(text)["input_ids"][-1]].argmax()) == token)
        return hits

    post = evaluated(ZSRE).records[0]["post"]
    assert post["rewrite_prompts_correct"] == memit("Lyon in", "New Peru") == [True, False]
    rephrased = [*memit("Lyon near", "New Peru"), *memit("Lyon by", "New Peru")]
    assert post["paraphrase_prompts_correct"] == rephrased == [False] * 4
    near = [*memit("Lyon near", "France"), *memit("Lyon by", "France"), *memit("Lyon in", "New Peru")]
    assert post["neighborhood_prompts_correct"] == near == [True, False, True, False]


def test_top_five_is_uniedits() -> None:
    """UniEdit, evaluation/llm_editor_eval.py, check_target_in_topk_prob_distribution.

    By hand, New Peru: Peru is the second after " New"; New is the sixth after " near", so a half, and among the first
    three after " by". Before the edit Lyon came after " near", now one of the least likely; France after " by" and
    " in", now the second or third; Delhi after " New", now too."""

    def top(said: Mapping[str, Mapping[str, float]], prompt: str, target: str) -> Tensor:
        ids = TOKENIZER(f"{prompt} {target}")["input_ids"]
        start = len(TOKENIZER(prompt)["input_ids"])
        return table(said)[ids].softmax(-1).topk(5).indices[start - 1 : -1]

    def share(prompt: str, target: str) -> float:
        own = TOKENIZER(f" {target}")["input_ids"]
        return float(np.mean([token in five for token, five in zip(own, top(EDITED, prompt, target), strict=True)]))

    def kept(prompt: str, target: str) -> float:
        before = top(UNEDITED, prompt, target)[:, 0]
        return float(np.mean([token in five for token, five in zip(before, top(EDITED, prompt, target), strict=True)]))

    found = figures(evaluated(UniEdit(originals())))
    rephrased = [share(query.prompt, query.target) for query in RECORD.rephrases]
    assert (found["generality/uniedit_top_5"], rephrased) == (np.mean(rephrased), [0.5, 1.0])
    assert found["portability/uniedit_top_5"] == share("Lyon in", "New Delhi") == 1.0
    near = [kept(query.prompt, query.target) for query in RECORD.locality["neighborhood"]]
    assert (found["locality/neighborhood/uniedit_top_5"], near) == (np.mean(near), [0.0, 1.0])
    assert found["locality/far/uniedit_top_5"] == kept("Lyon in", "New Peru") == 1.0


def test_entropy_and_cosine_are_romes() -> None:
    """On the golden texts (tests/golden/protocol_fluency.json), whose words NLTK and this project split alike."""
    content = golden("protocol_fluency.json")
    corpus = [text for *_, texts in content["references"] for text in texts]
    texts = {target: of for _, target, of in content["references"]}

    def entropy(text: str) -> float:
        """ROME, experiments/py/eval_utils_counterfact.py, compute_n_gram_entropy."""
        words, found = text.replace(",", " ,").split(), []
        for n in (2, 3):
            counts = np.array(list(Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values()))
            shares = counts / counts.sum()
            found.append(np.sum(-shares * np.log(shares) / np.log(2)))
        return float(np.mean(np.array(found) * np.array([2 / 3, 4 / 3])))

    def cosine(one: str, other: str) -> float:
        """The same file, tfidf_similarity, by scikit-learn's weights as its manual gives them."""
        known = sorted({word for text in corpus for word in text.split()})
        idf = [math.log((1 + len(corpus)) / (1 + sum(word in text.split() for text in corpus))) + 1 for word in known]
        a, b = (np.array([text.split().count(word) for word in known]) * idf for text in (one, other))
        return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))

    judge = CounterFact(
        fluency=True, references=References({("P17", target): tuple(of) for target, of in texts.items()})
    )
    editor = Told(Scripted(content["generated"], {}, content["probabilities"]))
    results = evaluate_pools(judge, editor, editor.model.backbone, content["records"], 3).records
    for result, written in zip(results, content["texts"], strict=True):
        assert result["post"]["ngram_entropy"] == pytest.approx(np.mean([entropy(text) for text in written]))
    expected = cosine(" ".join(content["texts"][0]), " ".join(texts["Q17"]))
    assert results[0]["post"]["reference_score"] == pytest.approx(expected)
    assert expected == pytest.approx(0.835592, abs=1e-6)
