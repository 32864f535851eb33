"""zsRE's protocol on two records whose answers are written down (tests/golden/protocol_zsre.json).

Worked out by hand. Tokens are letters; a record's value is over all tokens of its prompts of a sort, a figure the mean
over records, the score the harmonic mean of three figures. Of several answers the first is scored.

    lyon  efficacy     "Pera" of Peru                                  3/4
          paraphrase   Peru 4/4 and "xexx" 1/4                         5/8
          specificity  "Ann Poe" of Ann Lee 5/7 and 4 1/1              6/8, by prompts it would be 6/7
    oslo  efficacy     Mali                                            4/4
          paraphrase   "Repu" of Mali, though an alias begins so       0/4
          specificity  "Adx" of Ada; asked though it names Lyon        2/3

    efficacy (3/4 + 1) / 2 = 7/8    paraphrase (5/8 + 0) / 2 = 5/16    specificity (3/4 + 2/3) / 2 = 17/24
    score 3 / (8/7 + 16/5 + 24/17) = 1785 / 3424 = 0.521320; of oslo alone it would be 0

Beside it how questions are put, and MEMIT's own way of asking for one token at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.records import EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited
from modules.judging import evaluate_pools
from modules.training_free.icl import Unedited
from modules.zsre import ZSRE, ZSRE_PROTOCOLS
from tests.modules.protocols.scripted import BACKBONE, Scripted, Told, figures, golden

GOLDEN = golden("protocol_zsre.json")
RECORD = GOLDEN["records"][0]


def told() -> Told:
    return Told(Scripted({}, GOLDEN["forced"]))


def test_golden_figures() -> None:
    evaluation = evaluate_pools(ZSRE, told(), BACKBONE, GOLDEN["records"], 2)
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert set(GOLDEN["figures"]) == set(ZSRE_PROTOCOLS)
    assert evaluation.records[0]["post"]["rewrite_prompts_correct"] == [True, True, True, False]
    assert evaluation.settings["queries"] == 5 + 3


def test_a_question_mark_that_is_there_is_not_doubled() -> None:
    asked = replace(RECORD, locality={"nq": (Query("who wrote it?", ("Ann Lee",)),)})
    assert ("nq question: who wrote it?", "Ann Lee") in ZSRE.pairs(asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rephrases": ()}, "no rephrases"),
        ({"locality": {}}, "no locality queries"),
        ({"requests": (EditRequest(text="Lyon is in Peru."),)}, "not free text"),
        ({"locality": {"nq": (Query(" ", ("a",)),)}}, "without a prompt"),
    ],
)
def test_a_record_that_lacks_something_is_named_before_any_work(change: dict[str, Any], message: str) -> None:
    editor = told()
    with pytest.raises(ValueError, match=f"--protocol zsre: record 'bad' .*{message}"):
        evaluate_pools(ZSRE, editor, BACKBONE, [RECORD, replace(RECORD, id="bad", **change)], 2)
    assert not editor.made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_pass_equals_asking_for_one_token_after_another(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    # a random model says none of the answers above; of what it says itself, cut and spoilt, it knows some
    said = Edited(backbone).generate([RECORD.request.prompt + " a"], max_new_tokens=6)[0]
    target = "a" + "".join(c if c.isascii() and c.isprintable() else "b" for c in said) + "z"
    record = replace(RECORD, requests=(replace(RECORD.request, target=target),))
    (result,) = evaluate_pools(ZSRE, Unedited(), backbone, [record], 1).records

    def memit(prompt: str, target: str) -> list[bool]:
        hits, target = [], f" {target}"
        for i in range(len(target)):  # a token a byte: each prefix of the answer, and the token that follows
            ids = backbone.tokenizer(f"{prompt}{target[:i]}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                best = backbone.model(input_ids=ids).logits[0, -1].argmax()
            hits.append(backbone.tokenizer.decode([int(best)]) == target[i])
        return hits

    assert result["post"]["rewrite_prompts_correct"] == memit(record.request.prompt, target)
    assert result["post"]["neighborhood_prompts_correct"] == [
        *memit("nq question: who wrote it?", "Ann Lee"),
        *memit("2 + 2 =", "4"),
    ]
