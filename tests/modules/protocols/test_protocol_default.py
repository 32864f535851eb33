"""EasyEdit's protocol on three records whose answers are written down (tests/golden/protocol_default.json).

Worked out by hand. Tokens are letters; a query's token accuracy is the share of its first answer's tokens that are the
argmax, a record's value the mean over its queries of a sort, a figure the mean over the records that have such queries.
EM: the text begins with an answer or alias in whole words, without articles.

    lyon  edit         "Peru." of Peru 4/4; "Peru, a land"                             1            EM 1
          rephrases    "Pexx" 2/4, "xeru" 3/4; "in Peru", "the Peru"                   0.625        EM 0, 1 -> 1/2
          near         "Rome", before the edit "Rama": r, m agree, 2/4; alias "Roma"   0.5          EM 1
          far          "five" as before, though four is right; alias "4"               1            EM 1
          none         no query of this kind: no value
          hop, alias   Spanish 7/7, "Pxxx" 1/4; "Spanishly", "Peru"                    1, 0.25      EM 0, 1
          multi-hop    "Dxxx B": Dina 1/4, Dina B 3/6; "xixx": 1/4, 1/6; the best      0.5          EM 0, 1 -> 1
    oslo  edits        "Mali" 4/4, "Fuxx" 2/4; "Mali", "French"                        0.75         EM 1, 0 -> 1/2
          near         names Lyon, which lyon edits: left out, so no locality; no rephrases
    bern  free text    no prompt of its own: no reliability
          rephrase     "xxxx", nothing                                                 0            EM 0
          near         lyon's query, asked once; "Roma" is no alias here               0.5          EM 0
          hop          "Aax" of Aar 2/3; "Aar", and the next line is not read          0.666667     EM 1

    reliability (1 + 0.75) / 2, by queries it would be 2.5 / 3     EM (1 + 1/2) / 2 = 0.75
    generality  (0.625 + 0) / 2 = 0.3125                           EM (1/2 + 0) / 2 = 0.25
    locality    ((0.5 + 1) / 2 + 0.5) / 2 = 0.625                  EM (1 + 0) / 2; near (1 + 0) / 2
    portability ((1 + 0.25) / 2 + 2/3) / 2 = 0.645833              EM (1/2 + 1) / 2 = 0.75
        of kind hop (1 + 2/3) / 2 = 0.833333                       EM (0 + 1) / 2
"""

import pytest

from modules.evaluation import Answers, TokenAccuracy
from modules.judging import evaluate_pools
from tests.modules.protocols.scripted import BACKBONE, Scripted, Told, figures, golden

GOLDEN = golden("protocol_default.json")


def model(which: str) -> Scripted:
    return Scripted(GOLDEN[which]["generated"], GOLDEN[which]["forced"])


@pytest.mark.parametrize("own_edit_only", [False, True])
def test_golden_figures(own_edit_only: bool) -> None:
    editor, unedited = Told(model("edited"), own_edit_only), model("unedited")
    judge = TokenAccuracy(Answers(unedited), exact_match=True)
    evaluation = evaluate_pools(judge, editor, BACKBONE, GOLDEN["records"], 3)
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    counts = {name: evaluation.aggregates[name]["records"] for name in GOLDEN["records_of"]}
    assert counts == GOLDEN["records_of"]
    assert [len(made) for made in editor.made] == ([1, 2, 1] if own_edit_only else [4])
    lyon, oslo, bern = evaluation.records
    assert {part: lyon[part] for part in ("pre", "post")} == GOLDEN["lyon"]
    assert lyon["requested_rewrite"] == {
        "prompt": "Lyon is in",
        "target_new": "Peru",
        "ground_truth": "Chad",
        "subject": "Lyon",
        "text": None,
    }
    assert [made["target_new"] for made in oslo["requested_rewrite"]] == ["Mali", "Fula"]
    assert (oslo["post"]["rephrase_acc"], oslo["post"]["locality"]) == ([], {})
    assert bern["post"]["rewrite_acc"] == []
    assert [record["left_out"] for record in evaluation.records] == [0, 1, 0]
    assert evaluation.settings["queries_left_out"] == 1
    # nine of lyon's prompts, oslo's two, bern's two that are not lyon's; each once, with two aliases of two questions
    assert len(unedited.asked) == len(set(unedited.asked)) == 13
    assert len(unedited.scored) == len(set(unedited.scored)) == 13 + 2


def test_without_exact_match_the_other_figures_are_the_same() -> None:
    edited = model("edited")
    judge = TokenAccuracy(Answers(model("unedited")))
    evaluation = evaluate_pools(judge, Told(edited), BACKBONE, GOLDEN["records"], 3)
    expected = {name: value for name, value in GOLDEN["figures"].items() if not name.endswith("exact_match")}
    assert figures(evaluation) == pytest.approx(expected, abs=1e-6)
    assert edited.asked == []  # nothing is generated
