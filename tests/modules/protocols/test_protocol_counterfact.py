"""CounterFact's protocol on two records whose probabilities are written down (tests/golden/protocol_counterfact.json).

Worked out by hand. p of a target is exp(-mean NLL), the geometric mean of its tokens' probabilities.

    lyon  own prompt   Japan sqrt(0.5 * 0.125) = 0.25, France 0.2                  won, by 0.05
                       (their products are 0.0625 and 0.2)
          paraphrases  0.1 and 0.4; 0.6 and cbrt(0.4 * 0.05 * 0.05) = 0.1          1/2; (-0.3 + 0.5) / 2 = 0.1
          neighbours   0.2 and 0.3; 0.2 and 0.2, a tie, which counts for neither   1/2; (0.1 + 0) / 2 = 0.05
    oslo  own prompt   0.2 and 0.2, a tie                                          lost, by 0
          paraphrase   0.2 and 0.1                                                 1; 0.1
          neighbour    0.1 and 0.2; asked though it names Lyon                     1; 0.1

    ES (1 + 0) / 2    PS (1/2 + 1) / 2 = 0.75    NS (1/2 + 1) / 2 = 0.75: records weigh alike, by prompts PS were 2/3
    EM (0.05 + 0) / 2 = 0.025    PM (0.1 + 0.1) / 2 = 0.1    NM (0.05 + 0.1) / 2 = 0.075
    S 3 / (2 + 4/3 + 4/3) = 9/14 = 0.642857; the mean of the records' own would be (0.6 + 0) / 2

Beside it a real model against the plainest reference.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from datamodules.records import EditRequest, Query
from modules.backbone import Backbone
from modules.counterfact import COUNTERFACT, COUNTERFACT_PROTOCOLS, CounterFact
from modules.judging import evaluate_pools
from modules.training_free.icl import InContext, RightEdit, Unedited
from tests.modules.protocols.scripted import BACKBONE, Scripted, Told, figures, golden

GOLDEN = golden("protocol_counterfact.json")
LYON = GOLDEN["records"][0]


def told(**changes: Any) -> Told:
    """An editor after whose edits the probabilities are the golden file's, but for some prompts'."""
    return Told(Scripted({}, {}, GOLDEN["probabilities"] | changes))


def test_golden_figures() -> None:
    editor = told()
    evaluation = evaluate_pools(COUNTERFACT, editor, BACKBONE, GOLDEN["records"], 2)
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert set(GOLDEN["figures"]) == set(COUNTERFACT_PROTOCOLS)
    assert all(set(cell) == {"value", "ci", "records"} for cell in evaluation.aggregates.values())
    lyon, oslo = evaluation.records
    assert lyon["requested_rewrite"]["ground_truth"] == "France"
    (own,) = lyon["post"]["rewrite_prompts_probs"]  # MEMIT's shape and unit: nats per token
    assert own == pytest.approx({"target_new": -math.log(0.25), "target_true": -math.log(0.2)})
    assert [len(lyon["post"][f"{sort}_prompts_probs"]) for sort in ("paraphrase", "neighborhood")] == [2, 2]
    assert len(oslo["post"]["neighborhood_prompts_probs"]) == 1
    assert [len(made) for made in editor.made] == [2]
    assert (evaluation.settings["records"], evaluation.settings["queries"]) == (2, 5 + 3)


def test_a_prompt_of_two_records_is_asked_once() -> None:
    again = replace(LYON, id="again", rephrases=LYON.rephrases[:1])
    editor = told()
    evaluation = evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON, again], 2)
    assert len(editor.model.scored) == len(set(editor.model.scored)) == 2 * 5
    assert evaluation.settings["queries"] == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"requests": LYON.requests * 2}, "holds 2 edits"),
        ({"requests": (replace(LYON.request, old_target=None),)}, "its old target"),
        ({"requests": (EditRequest(text="Lyon is in Japan."),)}, "a prompt, a target"),
        ({"rephrases": ()}, "no rephrases"),
        ({"locality": {"other": (Query("2 + 2 =", ("4",)),)}}, "no neighborhood queries"),
        ({"locality": {"neighborhood": (Query("Rome is in", ("Italy",)),)}}, "'Rome is in' with the answer 'Italy'"),
        ({"rephrases": (Query("", ("Japan",)),)}, "without a prompt"),
    ],
)
def test_a_record_that_lacks_something_is_named_before_any_work(change: dict[str, Any], message: str) -> None:
    editor = told()
    with pytest.raises(ValueError, match=f"--protocol counterfact: record 'bad' .*{message}"):
        evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON, replace(LYON, id="bad", **change)], 2)
    assert not editor.made


def test_a_model_that_its_edits_have_broken_is_not_measured() -> None:
    editor = told(**{"Nice is in": {"Japan": [0.2], "France": [0.3, math.nan]}})
    with pytest.raises(ValueError, match=r"'France' after 'Nice is in' log-probabilities of .*nan"):
        evaluate_pools(COUNTERFACT, editor, BACKBONE, [LYON], 1)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_probability_is_that_of_the_whole_target_after_the_prompt(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    record = replace(LYON, rephrases=(Query("Lyon lies in ", ("Japan",)),))  # its space is neither doubled nor scored
    evaluation = evaluate_pools(CounterFact(3), Unedited(), backbone, [record], 1)

    def nll(prompt: str, target: str) -> float:
        own = target if prompt.endswith(" ") else f" {target}"
        ids = backbone.tokenizer(f"{prompt.rstrip()} {target}", return_tensors="pt")["input_ids"]
        n = len(own.encode())  # the tokenizer has a token a byte; the space before the target is one
        with torch.no_grad():
            logits = backbone.model(input_ids=ids).logits[0].double()
        return float(torch.nn.functional.cross_entropy(logits[-n - 1 : -1], ids[0, -n:]))

    (result,) = evaluation.records
    prompts = {"rewrite": ["Lyon is in"], "paraphrase": ["Lyon lies in "], "neighborhood": ["Nice is in", "Metz is in"]}
    for sort, of in prompts.items():
        expected = [{"target_new": nll(p, "Japan"), "target_true": nll(p, "France")} for p in of]
        assert result["post"][f"{sort}_prompts_probs"] == [pytest.approx(e, rel=1e-4) for e in expected]


def test_what_stands_before_a_query_is_counted(tiny: Callable[..., Backbone]) -> None:
    backbone, told = tiny(), "Lyon is in Japan.\n"
    settings = [
        evaluate_pools(COUNTERFACT, editor, backbone, [LYON], 1).settings
        for editor in (Unedited(), InContext(), RightEdit())
    ]
    assert [s["context_tokens"] for s in settings] == [0, len(told), len(told)]  # a token a byte
    assert [s["queries"] for s in settings] == [5, 5, 5]
