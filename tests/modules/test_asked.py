"""Solved questions before the one that is asked: what edits are looked for by is the question alone."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from bag_of_words import BagOfWords

from datamodules.records import EditRequest
from modules.ability.task import Example, _fitted
from modules.asked import Asked, parts_of, question_of
from modules.backbone import Backbone
from modules.gist.editor import GistEdited
from modules.gist.model import GistModel
from modules.gist.pool import GistPool
from modules.protocols.few_shot import FewShot
from modules.training_free.icl import Unedited
from modules.training_free.mike import MIKE
from modules.training_free.rag import RAG

SHOTS = "Q: Where is Lyon? A: In France\n"
EDITS = [EditRequest("Lyon is a city in", "Japan", "Lyon"), EditRequest("The river Ebro flows through", "Peru", "Ebro")]


def test_it_is_its_text_and_knows_its_parts() -> None:
    prompt = Asked(SHOTS, "Q: Who? A:", "Who?")
    for one in (prompt, copy.deepcopy(prompt), pickle.loads(pickle.dumps(prompt))):
        assert one == SHOTS + "Q: Who? A:"
        assert (parts_of(one), question_of(one)) == ((SHOTS, "Q: Who? A:"), "Who?")
    assert Asked(SHOTS, "Who?").question == "Who?"
    assert (parts_of("Who?"), question_of("Who?")) == (("", "Who?"), "Who?")


def test_protocols_and_tasks_say_what_is_asked(tiny: Callable[..., Backbone]) -> None:
    few_shot = FewShot(multi_hop=SHOTS, single_hop="Q: One? A: 1")
    assert question_of(few_shot.ask("Who?")) == question_of(few_shot.ask_hop("Who?")) == "Who?"
    assert parts_of(few_shot.ask("Who?")) == (SHOTS, "Q: Who? A:")
    thinking = FewShot(multi_hop="Question: One?\nThoughts: so.\nAnswer: 1")
    assert parts_of(thinking.ask("Who?"))[1] == "Question: Who?\nThoughts:"
    example = Example("0", "Who?\nAnswer:", ("A",), head="About people.\n\n", shots=("One?\nAnswer: B\n\n",))
    fitting = _fitted(example, tiny(), 3)
    assert fitting is not None
    assert parts_of(fitting.prompt) == ("About people.\n\nOne?\nAnswer: B\n\n", "Who?\nAnswer:")


@pytest.mark.parametrize("make", [lambda: RAG(top_k=1), lambda: MIKE(k=0)], ids=["rag", "mike"])
def test_what_stands_before_it_is_of_the_question(
    tiny: Callable[..., Backbone], make: Callable[[], RAG | MIKE]
) -> None:
    editor = make()
    editor.sentences = BagOfWords()
    with editor.edit(tiny(), EDITS) as edited:
        about = edited.contexts(["Where does the river Ebro flow?", Asked(SHOTS, "Q: Where does the river Ebro flow?")])
    assert about[0] == about[1]
    assert "Ebro" in str(about[0])
    assert "Lyon" not in str(about[0])


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_gists_are_read_in_the_question_alone(tiny_gists: Callable[..., GistModel], selection: str) -> None:
    """As one text they are about the edit that is named before the question, which is about none."""
    model = tiny_gists(selection=selection)
    if selection == "hidden":
        assert model.matcher is not None
        with torch.no_grad():  # nothing but the same letter matches, and that for certain
            model.matcher.log_scale.fill_(math.log(1000.0))
            model.matcher.threshold.fill_(0.7)
    edited = GistEdited(model, [], GistPool()).add([EditRequest(text="aaaaaaaa")])
    shots = "aaaa\n"
    asked, whole = Asked(shots, "xyz"), f"{shots}xyz"
    with Unedited().edit(model.reader, []) as unedited:
        plain = unedited.score([whole], ["Oslo"])[0].log_probs
    told = edited.score([asked, whole], ["Oslo"] * 2)
    far = [float((score.log_probs - plain).abs().max()) for score in told]
    assert far[1] > 0.01
    if selection == "hidden":
        assert far[0] < 1e-4
    else:  # the question's own tokens read, as they would after a context of the unedited model's
        assert far[0] > 0.01
    # the same text by another way: the unedited model's context, and the question alone with the pool
    assert edited.generate([asked, "xyz"], 4) == [edited.generate([p], 4)[0] for p in (asked, "xyz")]
    empty = GistEdited(model, [], GistPool())
    assert torch.equal(empty.score([asked], ["Oslo"])[0].log_probs, plain)
