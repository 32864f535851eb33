"""UniEdit's protocol on two records whose likeliest answers are written down (tests/golden/protocol_uniedit.json).

Worked out by hand. Tokens are letters; each place of a target has the letters that the texts have there, five at most.

    lyon  edit      "Japon" of Japan, the argmax alone                                                  4/5
          Rep, SA   Chile, Jaxxx, xxpan: J, a, p, a, n are each in one of them                          5/5
          MH        rests on Tokyo, which is unknown: edited in first; then Paris, Tokyo                5/5
          SER       "No ", Yes: of a yes/no question the first alone                                    0/3
          RS        was Italy; now Latio, Itxxx, xxaxx: I, t, a                                         3/5
    oslo  edit      Peru                                                                                4/4
          flag      no criteria, so portability of its kind: Lima has only L in the five likeliest
                    texts, the sixth counts nothing; its alias Lxxx is not asked                        1/4
          multi-hop Dxxx, xixx of Dina                                                                  2/4
          OS        rests on lyon's fact the other way round: left out
          SER, SS   was Yes; now "Yeo", oos: the first alone                                            2/3
          no rephrases, and no questions with criteria: no generality

    reliability (4/5 + 1) / 2 = 0.9      generality (1 + 1 + 0) / 3, of lyon alone
    locality    (3/5 + 2/3) / 2 = 0.633333

Beside it when hops are made, and real editors.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from datamodules.readers import read
from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.evaluation import Answers
from modules.gist.editor import GistEditor
from modules.gist.model import GistModel
from modules.judging import evaluate_pools
from modules.modes import consecutive
from modules.training_free.icl import InContext, RightEdit, Unedited
from modules.uniedit import UNIEDIT_PROTOCOLS, UniEdit, kept, within, without_known_facts
from tests.modules.protocols.scripted import BACKBONE, Scripted, figures, golden

GOLDEN = golden("protocol_uniedit.json")


class Taught(Editor):
    """Says each edit's target, and what a script adds where all of some prompts are edited.

    Args:
        rules: (the prompts that must be edited, prompt, what is then said to it).
        further: whether edits can be made on top of edits.
    """

    name = "taught"

    def __init__(self, rules: Sequence[tuple[set[str], str, Sequence[str]]], further: bool = True) -> None:
        self.rules, self.further = rules, further
        self.made: list[tuple[str, ...]] = []
        self.now: list[tuple[str, ...]] = []

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        assert not self.now, "an edit within an edit that is in place"
        with self.pushed(requests) as edited:
            yield edited

    @contextmanager
    def pushed(self, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        self.now.append(tuple(r.prompt for r in requests))
        self.made.append(self.now[-1])
        says: dict[str, Sequence[str]] = {r.prompt: (r.target,) for r in requests}
        says |= {prompt: said for need, prompt, said in self.rules if need <= set(self.made[-1])}
        edited = Scripted({}, says)
        if self.further:
            edited.edit = lambda more: self.pushed([*requests, *more])  # type: ignore[method-assign]
        yield edited
        self.now.pop()


RECORD = GOLDEN["records"][0]
TWO_HOPS = RECORD.portability["multi_hop"][0]
JAPAN, TOKYO = RECORD.request, TWO_HOPS.hops[0]
RULES: list[tuple[set[str], str, Sequence[str]]] = [
    *((set(), prompt, said) for prompt, said in GOLDEN["edited"].items()),
    *(({hop}, prompt, said) for hop, of in GOLDEN["with_hop"].items() for prompt, said in of.items()),
]


def originals() -> Answers:
    return Answers(Scripted({}, GOLDEN["unedited"]))


def run(editor: Editor, records: Sequence[EditRecord] = (RECORD,), size: int = 1, **more: Any) -> Any:
    return evaluate_pools(UniEdit(originals()), editor, BACKBONE, records, size, **more)


@pytest.mark.parametrize("further", [True, False])
def test_golden_figures(further: bool) -> None:
    evaluation = run(Taught(RULES, further), GOLDEN["records"], 2)
    assert figures(evaluation) == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert evaluation.settings["hops_made"] == ("further" if further else "together")
    assert (evaluation.settings["queries_with_unknown_hops"], evaluation.settings["hops_edited"]) == (1, 1)
    assert [record["left_out"] for record in evaluation.records] == [0, 1]
    asked = evaluation.records[0]["post"]["generality"]
    assert [(a["hops"], a["hops_edited"]) for a in asked] == [(0, 0), (1, 1), (0, 0)]
    assert set(evaluation.aggregates["locality/uniedit_top_5"]) == {"value", "ci", "records"}
    assert evaluation.aggregates["generality/uniedit_top_5"]["records"] == 1
    assert {name.replace("/MH/", "/<criterion>/") for name in figures(evaluation) if "MH" in name} <= set(
        UNIEDIT_PROTOCOLS
    )


@pytest.mark.parametrize("further", [True, False])
def test_hops_are_there_for_their_question_alone(further: bool) -> None:
    editor = Taught([*RULES, ({TOKYO.prompt}, "Where is Lyon?", ("wrong",))], further)
    other = EditRecord(
        "oslo", (EditRequest("Oslo is in", "Peru", fact=("Oslo", "Peru")),), rephrases=(Query("O", ("P",)),)
    )
    evaluation = run(editor, [RECORD, other], 2)
    assert editor.made == [("Lyon is in", "Oslo is in"), ("Lyon is in", "Oslo is in", TOKYO.prompt)]
    assert not editor.now
    assert figures(evaluation)["generality/Rep/uniedit_top_5"] == 0.5  # Lyon's, not Oslo's


def test_a_hop_that_the_edited_model_knows_is_not_edited() -> None:
    knows = [*RULES, (set(), TOKYO.prompt, ("Kyoto", "Txxxx", "xokyo")), (set(), TWO_HOPS.prompt, ("Tokxx",))]
    editor = Taught(knows)
    evaluation = run(editor)
    assert len(editor.made) == 1
    assert figures(evaluation)["generality/MH/uniedit_top_5"] == 0.6
    assert (evaluation.settings["hops_made"], evaluation.settings["hops_edited"]) == ("none", 0)
    # almost knowing it, all but one letter, is not enough
    almost = Taught([*RULES, (set(), TOKYO.prompt, ("Tokyx",))])
    run(almost)
    assert len(almost.made) == 2


def test_equal_hops_of_several_questions_are_edited_once() -> None:
    twice = replace(RECORD, portability={"multi_hop": (TWO_HOPS, replace(TWO_HOPS, prompt="Another:"))})
    editor = Taught(RULES)
    evaluation = run(editor, [twice])
    assert len(editor.made) == 2
    assert evaluation.settings["queries_with_unknown_hops"] == 2


def test_an_editor_given_its_own_edit_only_gets_its_own_hops_too() -> None:
    class Own(Taught):
        own_edit_only = True

    other = replace(RECORD, id="b", requests=(EditRequest("Oslo is in", "Peru", fact=("Oslo", "Peru")),))
    editor = Own(RULES, further=False)
    evaluation = run(editor, [RECORD, other], 2)
    assert editor.made == [
        ("Lyon is in",),
        ("Lyon is in", TOKYO.prompt),
        ("Oslo is in",),
        ("Oslo is in", TOKYO.prompt),
    ]
    assert evaluation.pool_size == 2


def test_locality_that_rests_on_an_edits_fact_is_left_out_and_counted() -> None:
    other = EditRecord("rome", (EditRequest("A city of Italy is", "Rome", fact=("Italy", "Rome")),))
    thinned, left_out = without_known_facts([RECORD, other])
    assert (thinned[0].locality, left_out) == ({"relation": ()}, [1, 0])
    assert without_known_facts([RECORD])[1] == [0]
    evaluation = run(Taught(RULES), [RECORD, other], 2)
    assert evaluation.settings["queries_left_out"] == 1
    assert [r["left_out"] for r in evaluation.records] == [1, 0]
    assert "locality/uniedit_top_5" not in evaluation.aggregates
    assert run(Taught(RULES), [RECORD, other], 1).settings["queries_left_out"] == 0


def test_other_sets_are_judged_by_kind_and_left_out_by_name(records: list[EditRecord]) -> None:
    mixed = [replace(records[0], multi_hop=(Query("Flag of A:", ("Land 0",)),)), records[1]]
    near = {"near": (Query("City B is in", ("Peru",)), Query("Village A is in", ("Peru",)))}
    mixed[0] = replace(mixed[0], locality=near)
    assert without_known_facts(mixed)[1] == [1, 0]
    evaluation = run(Taught([(set(), "Flag of A:", ("Lxxd", "xan"))]), mixed, 2)
    assert set(figures(evaluation)) == {
        "reliability/token_accuracy",
        "generality/uniedit_top_5",
        "generality/Rep/uniedit_top_5",
        "portability/uniedit_top_5",
        "portability/hop/uniedit_top_5",
        "multi_hop/uniedit_top_5",
        "locality/uniedit_top_5",
        "locality/near/uniedit_top_5",
    }
    assert figures(evaluation)["multi_hop/uniedit_top_5"] == pytest.approx(4 / 6)
    assert figures(evaluation)["locality/uniedit_top_5"] == 1.0  # both say '?'


def test_shares() -> None:
    top = torch.tensor([[1, 2], [3, 4], [5, 6]])
    score = TargetScore(torch.zeros(3), top[:, 0], torch.tensor([2, 3, 9]), top)
    assert within(score) == pytest.approx(2 / 3, abs=1e-6)
    assert within(score, 1) == pytest.approx(1 / 3, abs=1e-6)
    assert within(TargetScore(torch.zeros(0), torch.zeros(0), torch.zeros(0), torch.zeros(0, 5))) is None
    words: Any = SimpleNamespace(decode=lambda ids: {7: "a", 2: "a"}.get(ids[0], str(ids[0])))
    before = TargetScore(torch.zeros(3), torch.tensor([7, 4, 8]), torch.zeros(3))
    assert kept(score, before, words) == pytest.approx(2 / 3, abs=1e-6)  # 7 and 2 are one string
    assert kept(score, before, words, 1) == 0.0
    assert kept(score, replace(before, predicted=torch.tensor([4, 6])), words) == 1.0  # the last two places


def test_real_editors_on_generated_facts(tiny_gists: Callable[..., GistModel], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hops are made on top of the edits, or all in one call: the same for gists."""
    records = list(read("facts_uniedit", split="val", cities_per_country=2))[:6]
    model = tiny_gists(backbone={"max_position_embeddings": 4096})
    backbone = model.backbone
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    judge = UniEdit(Answers(Edited(backbone)))
    editors = (Unedited(), InContext(), GistEditor(model))
    found = {e.name: evaluate_pools(judge, e, backbone, records, 3) for e in editors}
    assert {name: e.settings["hops_made"] for name, e in found.items()} == dict.fromkeys(found, "further")
    assert list(found) == ["unedited", "icl", "incomes"]
    assert all(torch.equal(p, before[n]) for n, p in backbone.model.named_parameters())
    assert figures(found["unedited"])["locality/uniedit_top_5"] == 1.0
    one, two = found["unedited"], evaluate_pools(judge, RightEdit(), backbone, records, 3)
    assert len(one.records) == len(two.records) == 6
    # an editor that can take no further edits gives the same, all made in one call
    monkeypatch.setattr("modules.gist.editor.GistEdited.edit", Edited.edit)
    together = evaluate_pools(judge, GistEditor(model), backbone, records, 3)
    assert together.settings["hops_made"] == "together"
    assert [r["post"] for r in together.records] == [r["post"] for r in found["incomes"].records]


def test_editing_one_after_another_takes_hops_back() -> None:
    other = replace(RECORD, id="oslo", requests=(EditRequest("Oslo is in", "Peru", fact=("Oslo", "Peru")),))
    editor, judge = Taught(RULES), UniEdit(originals())
    found = consecutive(editor, BACKBONE, [RECORD, other], 1, [1], judge)
    first = run(Taught(RULES))
    assert found[0].evaluation.records == first.records
    assert found[1].evaluation.settings["hops_made"] == "further"
    own = [JAPAN.prompt, "Oslo is in"]
    # the first edit; its hop; the second edit on the first, without that hop; both records' hop
    assert editor.made == [(own[0],), (own[0], TOKYO.prompt), tuple(own), (*own, TOKYO.prompt)]


def test_hops_that_cannot_be_taken_back_are_refused_where_edits_stay() -> None:
    judge = UniEdit(originals())
    with pytest.raises(NotImplementedError, match=r"taught cannot edit on top of edits.*--mode single or batch"):
        consecutive(Taught(RULES, further=False), BACKBONE, [RECORD], 1, [1], judge)
