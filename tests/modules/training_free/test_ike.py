"""IKE and RAG: which edits a query is told, and what stands before it, to the letter."""

from collections import Counter
from pathlib import Path

import pytest
from bag_of_words import BagOfWords, training_edit, written

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited
from modules.prompted import Prompted, PromptEditor
from modules.training_free import IKE, RAG
from modules.training_free.icl import InContext

LYON = EditRequest("Lyon is in", "Japan", "Lyon")
MOVED = EditRequest(text="The mayor of Rome has moved to Oslo!")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    return written(tmp_path / "train.jsonl", [training_edit(f"City {i}") for i in range(40)])


def contexts(editor: PromptEditor, backbone: Backbone, requests: list[EditRequest], *prompts: str) -> list[str]:
    if "sentences" not in vars(editor):
        editor.sentences = BagOfWords()  # type: ignore[assignment]
    with editor.edit(backbone, requests) as edited:
        assert isinstance(edited, Prompted)
        return [str(context) for context in edited.contexts(prompts)]


def test_every_query_is_told_the_nearest_edit(sources: list, tiny) -> None:
    ike = IKE(sources, copy=0, update=0, retain=0)
    lyon = "New Fact: Lyon is in Japan\nPrompt: Lyon is in Japan\n\nNew Fact: Lyon is in Japan\nPrompt: "
    text = MOVED.text
    moved = f"New Fact: {text}\nPrompt: {text}\n\nNew Fact: {text}\nPrompt: "
    queries = ("Where is Lyon?", "Who is the mayor of Rome?", "Nara is in", "What has moved?")
    assert contexts(ike, tiny(), [LYON, MOVED], *queries) == [lyon, moved, lyon, moved]
    assert "corpus" not in vars(ike)


def test_kinds_are_as_many_as_published_in_an_order_of_each_edit(sources: list, tiny) -> None:
    ike = IKE(sources)
    orders = []
    backbone = tiny(max_position_embeddings=4096)
    for text in contexts(ike, backbone, [LYON, MOVED], "Lyon is in", "Who is the mayor of Rome?"):
        shown = [demonstration.splitlines() for demonstration in text.split("\n\n")[:32]]
        order = ["retain" if "Chile" in p else "update" if "They say" in p else "copy" for _, p in shown]
        assert Counter(order) == {"copy": 4, "update": 12, "retain": 16}
        assert len({fact for fact, _ in shown}) == 32
        orders.append(order)
    assert orders[0] != orders[1]
    again, other = IKE(sources), IKE(sources, seed=1)
    first, repeated, changed = (contexts(e, backbone, [LYON], "Lyon is in") for e in (ike, again, other))
    assert first == repeated != changed
    with pytest.raises(ValueError, match="must not be negative, got 4, -1, 16"):
        IKE(update=-1)


def test_a_short_window_leaves_the_nearest_demonstrations(sources: list, tiny) -> None:
    ike = IKE(sources)
    (whole,) = contexts(ike, tiny(max_position_embeddings=4096), [LYON], "Lyon is in")
    (part,) = contexts(ike, tiny(max_position_embeddings=500), [LYON], "Lyon is in")
    assert whole.endswith(part)
    assert part.startswith("New Fact: City")
    assert 500 - 32 - len("Lyon is in") - 80 < len(part) <= 500 - 32 - len("Lyon is in")


def test_rag_tells_the_nearest_edits_the_nearest_last(tiny) -> None:
    rag, backbone = RAG(top_k=2), tiny()
    requests = [LYON, MOVED, EditRequest("Lyon is", "big")]
    assert contexts(rag, backbone, requests, "Lyon is in", "Rome has moved") == [
        "Lyon is big. Lyon is in Japan.\n",
        "Lyon is in Japan. The mayor of Rome has moved to Oslo!\n",
    ]
    assert contexts(RAG(), tiny(max_position_embeddings=75), requests, "Lyon is in") == [
        "Lyon is big. Lyon is in Japan.\n"  # the third, the farthest, does not fit
    ]
    with pytest.raises(ValueError, match="top_k must be at least 1, got 0"):
        RAG(top_k=0)


def test_with_one_edit_rag_is_in_context_learning(tiny) -> None:
    backbone, rag = tiny(), RAG()
    rag.sentences = BagOfWords()  # type: ignore[assignment]
    prompts, targets = ["Lyon is in", "Where?", "Rome is in"], ["Japan", "there", "Peru"]
    with rag.edit(backbone, [LYON]) as one, InContext().edit(backbone, [LYON]) as other:
        for a, b in zip(one.score(prompts, targets), other.score(prompts, targets), strict=True):
            assert a.log_probs.tolist() == pytest.approx(b.log_probs.tolist(), abs=1e-4)
        assert one.context_tokens(prompts) == [len("Lyon is in Japan.\n")] * 3
        plain = Edited(backbone).score(prompts, targets)
        assert plain[0].log_probs.tolist() != pytest.approx(one.score(prompts, targets)[0].log_probs.tolist(), abs=1e-4)
