"""MQuAKE's protocol on four cases whose answers are written down (tests/golden/protocol_mquake.json).

Worked out by hand; cy rests on the unedited hop "Which country is Bo in?" (Oman), which bo edits to Chad.

    case  hops edits  edits recalled                  unedited hops known        any of three      best tokens
    zoe   2    1      Oman: 1                         "Haitham bin Tariq.": 1    the second: 1     Haitxxx: 4/7
    al    3    2      Acme: 1, "Romeo": 0 -> 0.5      "Italia": 0                none, 0           Italy: 1
    bo    2    2      "the Chad": 1, an alias: 1      (there are none)           "Mars.": 1        Mars: 1
    cy    2    1      "Bo.": 1                        Oman: 1                    1                 nothing: 0

al's answers are "italy" (not letter by letter), "Italy and France" and "It is Italy" (not the whole line); zoe's first
and third are another and "Sultan Haitham". Instance-wise: zoe 1, al 0, bo 1, cy 1. In a pool of all, cy is not asked:

    edit-wise (1 + 0.5 + 1) / 3 = 0.833333    of 2 hops (1 + 1) / 2    of 2 edits (0.5 + 1) / 2 = 0.75
    tokens (4/7 + 1 + 1) / 3 = 0.857143       of 2 hops (4/7 + 1) / 2 = 0.785714
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Editor
from modules.judging import Evaluation, evaluate_pools
from modules.modes import consecutive
from modules.protocols.few_shot import FewShot
from modules.protocols.mquake import MEASURES, MQUAKE_PROTOCOLS, MQuAKE, same_answer
from modules.training_free.icl import InContext, Unedited
from tests.modules.protocols.scripted import BACKBONE, Scripted, Told, figures, golden

GOLDEN = golden("protocol_mquake.json")
SHOWN = FewShot("Q: D? A: d", "Q: S? A: s")


def evaluate_mquake(
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    size: int,
    progress: Any = None,
    look: Any = None,
    **how: Any,
) -> Evaluation:
    return evaluate_pools(MQuAKE(**how), editor, backbone, records, size, progress=progress, look=look)


def told(own_edit_only: bool = False) -> Told:
    return Told(Scripted(GOLDEN["generated"], GOLDEN["forced"]), own_edit_only)


def test_golden_figures() -> None:
    editor, done, seen = told(), [], []
    evaluation = evaluate_mquake(
        editor,
        BACKBONE,
        GOLDEN["records"],
        4,
        few_shot=SHOWN,
        progress=done.append,
        look=lambda edited, cases: seen.extend(case.id for case in cases),
    )
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert [len(made) for made in editor.made] == [6]  # cy's edit too
    assert (done, seen) == ([4], ["zoe", "al", "bo"])
    assert evaluation.settings["records_contradicted"] == 1
    assert evaluation.settings["demonstrations"] == "given"
    assert evaluation.settings["demonstrations_hash"] == SHOWN.digest
    zoe = evaluation.records[0]
    assert (zoe["case_id"], zoe["requested_rewrite"]["target_new"]) == ("zoe", "Oman")
    assert zoe["post"]["multi_hop_answers"] == ["Boluarte", "Haitham", "Sultan Haitham"]


def test_demonstrations_are_told_apart_by_their_texts() -> None:
    others = [FewShot(SHOWN.multi_hop, "Q: T? A: t"), FewShot(*[SHOWN.multi_hop] * 2, {"r": "Q: S? A: s"})]
    assert len({SHOWN.digest, *(other.digest for other in others)}) == 3
    assert FewShot("Q: D? A: d", "Q: S? A: s").digest == SHOWN.digest
    assert "demonstrations_hash" not in MQuAKE().options()  # this project's own


@pytest.mark.parametrize(("size", "conflicts"), [(1, False), (4, True)])
def test_a_case_by_itself_is_asked_whatever_the_others_edit(size: int, conflicts: bool) -> None:
    evaluation = evaluate_mquake(told(), BACKBONE, GOLDEN["records"], size, few_shot=SHOWN, conflicts=conflicts)
    found = figures(evaluation)
    assert [r["case_id"] for r in evaluation.records] == ["zoe", "al", "cy", "bo"]
    assert found["multi_hop/mquake_accuracy"] == found["single_hop/mquake_instance_wise"] == 3 / 4
    assert found["reliability/mquake_edit_wise"] == 3.5 / 4
    assert found["multi_hop/1_edit/token_accuracy_max"] == pytest.approx((4 / 7 + 0) / 2, abs=1e-6)


def test_an_upper_bound_gets_its_own_edits_and_the_questions_of_the_pool() -> None:
    editor, done = told(own_edit_only=True), []
    evaluation = evaluate_mquake(editor, BACKBONE, GOLDEN["records"], 4, few_shot=SHOWN, progress=done.append)
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert [len(made) for made in editor.made] == [1, 2, 2]
    assert sum(done) == 4


def test_editing_one_after_another_asks_the_same_cases_at_every_checkpoint() -> None:
    model = Scripted(GOLDEN["generated"], GOLDEN["forced"])
    model.add = lambda requests: model  # type: ignore[attr-defined]
    found = consecutive(Told(model), BACKBONE, GOLDEN["records"], 1, [1, 3], MQuAKE(SHOWN))
    zoe_al_cy_bo = [["zoe"], ["zoe", "al"], ["zoe", "al", "bo"]]  # cy rests on what bo's edit, the last one, changes
    assert [[r["case_id"] for r in point.evaluation.records] for point in found] == zoe_al_cy_bo
    assert [point.evaluation.settings["records_contradicted"] for point in found] == [0, 1, 1]
    assert figures(found[-1].evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert [point.first["multi_hop/mquake_accuracy"]["value"] for point in found] == [1.0] * 3  # zoe's


def test_a_chain_that_is_not_whole_has_no_instance_wise_accuracy() -> None:
    zoe = GOLDEN["records"][0]
    fewer = replace(zoe, portability={"single_hop": zoe.portability["single_hop"][:1]})
    found = figures(evaluate_mquake(told(), BACKBONE, [fewer], 1, few_shot=SHOWN))
    assert not any("instance_wise" in name for name in found)
    assert found["reliability/mquake_edit_wise"] == 1.0


def test_refusals() -> None:
    plain = EditRecord("plain", (EditRequest("a", "b"),))
    with pytest.raises(ValueError, match="record 'plain' has no multi-hop questions"):
        evaluate_mquake(told(), BACKBONE, [plain], 1)
    cy, bo = GOLDEN["records"][2:]
    against = replace(bo, portability={"single_hop": (Query("Where does Cy live?", ("Peru",)),)})
    editor = told()
    with pytest.raises(ValueError, match="every case is contradicted"):
        evaluate_mquake(editor, BACKBONE, [cy, against], 2)
    assert editor.made == []  # told before any work


def test_same_answer() -> None:
    assert same_answer(" Washington, D.C.", ("Rome", "Washington, D.C"))
    assert not same_answer("rome", ("Rome",))
    assert not same_answer("", ("Rome",))


def test_every_figure_has_its_definition() -> None:
    assert set(MEASURES) <= set(MQUAKE_PROTOCOLS)
    criteria = {part for name in GOLDEN["figures"] for part in name.split("/") if part[0].isdigit()}
    assert criteria == {"2_hops", "3_hops", "1_edit", "2_edits"}
    assert {name for name in GOLDEN["figures"] if name.count("/") == 1} == set(MEASURES)


def test_demonstrations() -> None:
    relations = {
        "P36": "Q: What is the capital of Peru? A: Lima\nQ: What is the capital of Bali? A: Denpasar",
        "P35": "Q: What is the head of Peru? A: X\nQ: What is the head of Chad? A: Y",
        "P6": "Q: What is the head of Peru's house? A: X\nQ: What is the head of Chad's house? A: Y",
    }
    shown = FewShot("Q: D? A: d", "Q: S? A: s", relations)
    assert shown.relation("What is the capital of Papua?") == "P36"
    assert shown.relation("What is the head of Oman's house?") == "P6"  # the longer wording of the two that fit
    assert shown.relation("What is the head of Oman?") == "P35"
    assert shown.relation("Who is it?") is None
    assert shown.ask_hop("What is the capital of Oman?") == relations["P36"] + "\nQ: What is the capital of Oman? A:"
    assert shown.ask_hop("Who?") == "Q: S? A: s\nQ: Who? A:"
    assert shown.ask("Who?") == "Q: D? A: d\nQ: Who? A:"
    assert shown.answer("\n Rome. \nQ: next") == "Rome."


def test_chains_of_thought() -> None:
    shown = FewShot("Question: D?\nThoughts: it is d.\nAnswer: d\n")
    assert shown.thinks
    assert not FewShot().thinks
    assert shown.ask("Who?") == "Question: D?\nThoughts: it is d.\nAnswer: d\n\nQuestion: Who?\nThoughts:"
    assert shown.answer(" It is Rome.\nAnswer: Rome\n\nQuestion: Who?\nAnswer: Al") == "Rome"
    assert shown.answer(" It is Rome, and") == ""


def test_own_demonstrations_are_questions_and_answers() -> None:
    own = FewShot()
    for lines in (own.multi_hop.splitlines(), own.single_hop.splitlines()):
        assert len(lines) == 8
        assert all(line.startswith("Q: ") and line.count("? A: ") == 1 for line in lines)


@pytest.mark.parametrize("kind", [Unedited, InContext])
def test_a_real_editor_on_a_random_model(kind: type, tiny: Callable[..., Backbone]) -> None:
    backbone, (zoe, al) = tiny("llama"), GOLDEN["records"][:2]
    with kind().edit(backbone, [*zoe.requests, *al.requests]) as edited:
        (said,) = edited.generate([SHOWN.ask(zoe.multi_hop[2].prompt)], max_new_tokens=4)
    assert SHOWN.answer(said)
    # zoe's third question is answered right, al's are not
    right = replace(zoe.multi_hop[2], answers=(SHOWN.answer(said),))
    knows = replace(zoe, multi_hop=(*zoe.multi_hop[:2], right))
    found = figures(evaluate_mquake(kind(), backbone, [knows, al], 2, few_shot=SHOWN, max_new_tokens=4))
    assert set(found) >= set(MEASURES)
    assert found["multi_hop/mquake_accuracy"] == 1 / 2
    assert found["multi_hop/2_hops/mquake_accuracy"] == 1
    assert found["multi_hop/3_hops/mquake_accuracy"] == 0
    assert found["reliability/mquake_edit_wise"] == found["single_hop/mquake_instance_wise"] == 0
