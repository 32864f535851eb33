"""zsRE's protocol: which tokens count, how questions are put, and MEMIT's own way of asking for one token at a time."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.judging import evaluate_pools
from modules.training_free.icl import Unedited
from modules.zsre import ZSRE, ZSRE_PROTOCOLS

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu")))
RECORD = EditRecord(
    "lyon",
    (EditRequest("Which country is Lyon in?", "Peru", "Lyon"),),
    rephrases=(Query("What is Lyon's country?", ("Peru",)), Query("Lyon is in?", ("Peru",))),
    locality={"nq": (Query("who wrote it", ("Ann Lee",)),), "other": (Query("2 + 2 =", ("4",)),)},
)
SAYS = {
    "Which country is Lyon in?": "Pera",  # 3 of 4
    "What is Lyon's country?": "Peru",
    "Lyon is in?": "xexx",  # 5 of 8 with the one before
    "nq question: who wrote it?": "Ann Poe",  # 5 of 7
    "2 + 2 =": "4",  # 6 of 8 with the one before
}


class Says(Editor):
    """Predicts the written-down text, a token a letter."""

    name = "says"
    edits = 0

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        self.edits += 1
        yield Speaker()


class Speaker(Edited):
    def __init__(self) -> None:
        self.backbone, self.context = BACKBONE, ""

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        said = [SAYS[prompt] for prompt in prompts]
        letters = [[torch.tensor([ord(c) for c in text]) for text in pair] for pair in zip(said, targets, strict=True)]
        return [TargetScore(torch.zeros(len(target)), spoken, target) for spoken, target in letters]


def test_every_figure_of_a_written_down_answer() -> None:
    evaluation = evaluate_pools(ZSRE, Says(), BACKBONE, [RECORD], 1)
    found = {name: cell["value"] for name, cell in evaluation.aggregates.items()}
    efficacy, paraphrase, specificity = 3 / 4, (4 + 1) / 8, (5 + 1) / 8  # tokens of all prompts of a sort alike
    assert found == pytest.approx(
        {
            "zsre/efficacy": efficacy,
            "zsre/paraphrase": paraphrase,
            "zsre/specificity": specificity,
            "zsre/score": 3 / (1 / efficacy + 1 / paraphrase + 1 / specificity),
        }
    )
    assert set(found) == set(ZSRE_PROTOCOLS)
    assert evaluation.records[0]["post"]["rewrite_prompts_correct"] == [True, True, True, False]
    assert evaluation.settings["queries"] == 5


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
    editor = Says()
    with pytest.raises(ValueError, match=f"--protocol zsre: record 'bad' .*{message}"):
        evaluate_pools(ZSRE, editor, BACKBONE, [RECORD, replace(RECORD, id="bad", **change)], 2)
    assert not editor.edits


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_pass_equals_asking_for_one_token_after_another(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    # a random model says none of the answers above; of what it says itself, cut and spoilt, it knows some
    said = Edited(backbone).generate([RECORD.request.prompt + " a"], max_new_tokens=6)[0]
    target = "a" + "".join(c if c.isascii() and c.isprintable() else "b" for c in said) + "z"
    record = replace(RECORD, requests=(replace(RECORD.request, target=target),))
    (result,) = evaluate_pools(ZSRE, Unedited(), backbone, [record], 1).records

    def memit(prompt: str, target: str) -> list[bool]:
        hits = []
        for i in range(len(target)):  # a token a byte: each prefix of the answer, and the token that follows
            ids = backbone.tokenizer(f"{prompt} {target[:i]}", return_tensors="pt")["input_ids"]
            with torch.no_grad():
                best = backbone.model(input_ids=ids).logits[0, -1].argmax()
            hits.append(backbone.tokenizer.decode([int(best)]) == target[i])
        return hits

    assert result["post"]["rewrite_prompts_correct"] == memit(record.request.prompt, target)
    assert result["post"]["neighborhood_prompts_correct"] == [
        *memit("nq question: who wrote it?", "Ann Lee"),
        *memit("2 + 2 =", "4"),
    ]
