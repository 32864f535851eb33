"""MIKE: which queries are in scope, and what stands before them, to the letter."""

import random
import re
from pathlib import Path

import pytest
import torch
from bag_of_words import BagOfWords, training_edit, written

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited
from modules.prompted import Prompted
from modules.training_free import MIKE

LYON = EditRequest("Lyon is in", "Japan", "Lyon")
MAYOR = EditRequest("The mayor of Lyon is", "Ada", "Lyon")
ROME = EditRequest("Rome is in", "Peru", "Rome")


@pytest.fixture
def mike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MIKE:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    records = [
        training_edit("Gold", "costs", "ten"),
        training_edit("Oslo", target="Chad"),
        training_edit("Rome", target="Japan"),
    ]
    return made(written(tmp_path / "train.jsonl", records), k=2)


def made(sources: list, **options: object) -> MIKE:
    editor = MIKE(sources, **options)  # type: ignore[arg-type]
    editor.sentences = BagOfWords()  # type: ignore[assignment]
    return editor


def contexts(editor: MIKE, backbone: Backbone, requests: list[EditRequest], *prompts: str) -> list[str | None]:
    with editor.edit(backbone, requests) as edited:
        assert isinstance(edited, Prompted)
        return edited.contexts(prompts)


def test_the_four_cases_of_retrieval(mike: MIKE, tiny) -> None:
    def told(*prompts: str) -> list[str | None]:
        found = contexts(mike, tiny(), [LYON, MAYOR, ROME], *prompts)
        return [text and text.split("New Fact: ")[-1] for text in found]

    copies = {
        edit: f"{text}\nPrompt: {text}\n\nPrompt: "
        for edit, text in ((LYON, "Lyon is in Japan"), (MAYOR, "The mayor of Lyon is Ada"), (ROME, "Rome is in Peru"))
    }
    assert told("Lyon is in", "The mayor of Lyon is") == [copies[LYON], copies[MAYOR]]  # exact
    assert told("How far is Rome?") == [copies[ROME]]  # a subject of one edit
    assert told("Who is the mayor of Lyon?", "What country is Lyon in?") == [copies[MAYOR], copies[LYON]]  # of several
    assert told("Who is the mayor of Oslo?", "Romeo is in", "Lyonnais is in", "") == [None] * 4  # unmatched


def test_the_prompt_to_the_letter(mike: MIKE, tiny) -> None:
    assert contexts(mike, tiny(), [LYON], "Is Lyon far?", "Is Oslo far?") == [
        "New Fact: Oslo is in Chad\nPrompt: They say Oslo is in Chad\n\n"
        "New Fact: Rome is in Japan\nPrompt: They say Rome is in Japan\n\n"
        "New Fact: Lyon is in Japan\nPrompt: Lyon is in Japan\n\n"
        "Prompt: ",
        None,
    ]
    (text,) = contexts(mike, tiny(), [LYON, ROME], "Is Lyon far?")  # Rome is edited, so it is not shown
    assert text == (
        "New Fact: Gold costs ten\nPrompt: They say Gold costs ten\n\n"
        "New Fact: Oslo is in Chad\nPrompt: They say Oslo is in Chad\n\n"
        "New Fact: Lyon is in Japan\nPrompt: Lyon is in Japan\n\n"
        "Prompt: "
    )


def test_switches(tmp_path: Path, mike: MIKE, tiny) -> None:
    none = made(mike.demonstrations, k=0)
    copy = "New Fact: Lyon is in Japan\nPrompt: Lyon is in Japan\n\nPrompt: "
    assert contexts(none, tiny(), [LYON], "Is Lyon far?") == [copy]
    assert "corpus" not in vars(none)  # nothing is read that is not shown
    every = made(mike.demonstrations, k=1, scope_aware=False)
    assert contexts(every, tiny(), [LYON, ROME], "Is Lyon far?") == [
        "New Fact: Oslo is in Chad\nPrompt: Oslo is in Chad\n\n"
        "New Fact: Oslo is in Chad\nPrompt: They say Oslo is in Chad\n\n"
        "New Fact: Oslo is in Chad\nPrompt: Next to Oslo lies Chile\n\n" + copy
    ]
    with pytest.raises(ValueError, match="k must not be negative"):
        MIKE(k=-1)


def test_what_does_not_fit_the_window_goes_farthest_first(mike: MIKE, tiny) -> None:
    (whole,) = contexts(mike, tiny(), [LYON, ROME], "Is Lyon far?")
    assert whole is not None
    gold, oslo, rest = whole.partition("New Fact: Oslo")
    window = len(whole) + len("Is Lyon far?") + 32
    assert contexts(mike, tiny(max_position_embeddings=window), [LYON, ROME], "Is Lyon far?") == [whole]
    assert contexts(mike, tiny(max_position_embeddings=window - 1), [LYON, ROME], "Is Lyon far?") == [oslo + rest]
    assert gold.startswith("New Fact: Gold")


def test_no_query_about_other_subjects_is_ever_rewritten(mike: MIKE, tiny) -> None:
    """Random edits and queries of random words; parts of words, and words of subjects, are no subjects."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdeé", k=draw.randint(1, 4))) for _ in range(60)]

    def phrase(low: int, high: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(low, high)))

    backbone = tiny()
    rewritten = 0
    for _ in range(40):
        subjects = [phrase(1, 2) for _ in range(6)]
        requests = [EditRequest(f"{s} {phrase(0, 2)} is".replace("  ", " "), "x", s) for s in subjects]
        queries = [phrase(1, 6) + draw.choice(["", "?", ".", "'s", ", a b"]) for _ in range(30)]
        for query, context in zip(queries, contexts(mike, backbone, requests, *queries), strict=True):
            said = f" {_plain(query)} "
            named = [s for s in subjects if f" {_plain(s)} " in said]
            assert (context is not None) <= bool(named), (query, subjects)
            if context is not None:
                rewritten += 1
                shown = context.split("New Fact: ")[-1]
                assert any(f"{r.prompt} x" in shown for r in requests if r.subject in named)
    assert rewritten > 50


def test_out_of_scope_is_bit_for_bit_the_unedited_model(mike: MIKE, tiny, records: list[EditRecord]) -> None:
    for kind in ("llama", "gpt2"):
        backbone = tiny(kind)
        near = [q for r in records for qs in r.locality.values() for q in qs]
        inside = [q for r in records for q in (*r.rephrases, *(p for ps in r.portability.values() for p in ps))]
        asked = [q for pair in zip(near, inside, strict=False) for q in pair]
        plain = Edited(backbone)
        with mike.edit(backbone, [r.request for r in records]) as edited:
            scores = edited.score([q.prompt for q in asked], [q.target for q in asked])
            texts = edited.generate([q.prompt for q in asked], max_new_tokens=4)
        before = plain.score([q.prompt for q in near], [q.target for q in near])
        for a, b in zip(scores[::2], before, strict=True):
            assert torch.equal(a.log_probs, b.log_probs)
        assert texts[::2] == plain.generate([q.prompt for q in near], max_new_tokens=4)
        changed = plain.score([q.prompt for q in inside[: len(near)]], [q.target for q in inside[: len(near)]])
        assert all(not torch.allclose(a.log_probs, b.log_probs) for a, b in zip(scores[1::2], changed, strict=True))


def test_edits_that_no_query_would_find_are_refused(mike: MIKE, tiny) -> None:
    for wrong in (EditRequest(text="Lyon has moved."), EditRequest("Lyon is in", "Japan")):
        with pytest.raises(ValueError, match=r"mike .*(free text|subject)"), mike.edit(tiny(), [LYON, wrong]):
            pass


def test_the_default_needs_no_file() -> None:
    (source,) = MIKE().demonstrations
    assert (source.format, source.path, source.sample) == ("facts", None, 1000)


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text))
