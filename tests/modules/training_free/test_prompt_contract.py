"""What holds of every editor that keeps its edits in a memory: nothing is changed, state, further edits, removal."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bag_of_words import BagOfWords, training_edit, written
from torch import Tensor, nn

from datamodules.records import EditRecord, EditRequest
from modules.backbone import PARTS
from modules.editor import Edited, TargetScore
from modules.evaluation import evaluate
from modules.modes import consecutive
from modules.remembering import MemoryEditor
from modules.training_free import FTL, IKE, MIKE, RAG, MeLLo
from modules.training_free.mello import FACT, FINAL, QUESTION

NAMES = ["mike", "ike", "rag", "mello"]
KINDS = sorted(PARTS)
PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]
SHOT = f"{QUESTION} a\nSubquestion: b\n{FACT} c\n{FINAL} d"


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], MemoryEditor]:
    """An editor by name, with few and short demonstrations."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    sources = written(tmp_path / "train.jsonl", [training_edit("Oslo"), training_edit("Rome")])
    shots = tmp_path / "shots.txt"
    shots.write_text(SHOT, encoding="utf-8")

    def made(name: str) -> MemoryEditor:
        editor: Any = {
            "mike": lambda: MIKE(sources, k=1),
            "ike": lambda: IKE(sources, copy=0, update=1, retain=0),
            "rag": lambda: RAG(top_k=2),
            "mello": lambda: MeLLo(hops=1, hop_tokens=4, prompt_file=str(shots)),
        }[name]()
        editor.sentences = BagOfWords()
        return editor

    return made


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [record.request for record in records]


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def same(a: list[TargetScore], b: list[TargetScore]) -> bool:
    return all(torch.equal(x.log_probs, y.log_probs) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_told_and_left_as_it_was(make, tiny, requests, kind: str, name: str) -> None:
    backbone = tiny(kind)
    weights, rng = state(backbone.model), torch.get_rng_state()
    before = Edited(backbone).score(PROMPTS, TARGETS)
    with make(name).edit(backbone, requests) as edited:
        now = edited.score(PROMPTS, TARGETS)
        assert not torch.allclose(now[0].log_probs, before[0].log_probs)
        assert len(edited.generate(PROMPTS, max_new_tokens=3)) == 3
        assert not edited.weight_changes()
    assert same(Edited(backbone).score(PROMPTS, TARGETS), before)
    assert all(map(torch.equal, weights, state(backbone.model)))
    assert torch.equal(rng, torch.get_rng_state())


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_restored_it_answers_the_same(make, tiny, requests, name: str, tmp_path: Path) -> None:
    backbone, editor = tiny(), make(name)
    with editor.edit(backbone, requests) as edited:
        expected = edited.score(PROMPTS, TARGETS)
        edited.save(tmp_path / "state")
    with editor.edit(backbone, []) as empty:
        assert same(empty.score(PROMPTS, TARGETS), Edited(backbone).score(PROMPTS, TARGETS))
        loaded = empty.restored(tmp_path / "state")
        assert loaded.requests == tuple(requests)
        assert same(loaded.score(PROMPTS, TARGETS), expected)
        with pytest.raises(ValueError, match="holds no edit memory"):
            empty.restored(tmp_path / "none")
        with FTL(steps=1).edit(backbone, requests[:1]) as other:
            other.save(tmp_path / "other")
        with pytest.raises(ValueError, match="holds no edit memory"):
            empty.restored(tmp_path / "other")


@pytest.mark.parametrize("name", NAMES)
def test_further_edits_and_removal(make, tiny, requests, name: str) -> None:
    backbone, editor = tiny(), make(name)
    with editor.edit(backbone, requests) as all_at_once, editor.edit(backbone, requests[:2]) as first:
        expected, before = all_at_once.score(PROMPTS, TARGETS), first.score(PROMPTS, TARGETS)
        with first.edit([*requests[1:], requests[2]]) as more:  # one of them is there, one is given twice
            assert more.requests == tuple(requests)
            assert same(more.score(PROMPTS, TARGETS), expected)
            left = more.remove(requests[2:])
        assert left.requests == first.requests == tuple(requests[:2])
        assert same(left.score(PROMPTS, TARGETS), before)
        assert same(first.score(PROMPTS, TARGETS), before)
        assert same(left.remove(requests[:2]).score(PROMPTS, TARGETS), Edited(backbone).score(PROMPTS, TARGETS))
        with pytest.raises(ValueError, match="not in the memory"):
            left.remove(requests[3:])
        changed = EditRequest(requests[0].prompt, "Chad", requests[0].subject)
        assert set(first.add([changed]).requests) == {requests[1], changed}  # it takes the place of the earlier one


@pytest.mark.parametrize("name", NAMES)
def test_it_is_evaluated_like_any_editor(make, tiny, records, name: str) -> None:
    backbone, editor = tiny(), make(name)
    found = evaluate(editor, backbone, records, 4, exact_match=True, max_new_tokens=3)
    assert len(found.records) == 4
    if name == "mike":  # neighbours are other subjects
        assert found.aggregates["locality/token_agreement"]["value"] == 1
    last = consecutive(editor, backbone, records, batch=2, checkpoints=[4])[-1]
    assert last.evaluation.aggregates == evaluate(editor, backbone, records, 4).aggregates


@pytest.mark.parametrize("name", NAMES)
def test_within_inference_mode_and_autocast(make, tiny, requests, name: str) -> None:
    backbone, editor = tiny(), make(name)
    with editor.edit(backbone, requests) as edited:
        expected = edited.score(PROMPTS, TARGETS)
    with torch.inference_mode(), editor.edit(backbone, requests[:2]) as edited, edited.edit(requests[2:]) as more:
        assert same(more.score(PROMPTS, TARGETS), expected)
    with more.edit([EditRequest("Oslo is in", "Chad", "Oslo")]) as last:
        assert len(last.requests) == 5
    unedited = Edited(backbone).score(PROMPTS, TARGETS)
    backbone.model.bfloat16()
    with editor.edit(backbone, requests) as edited:
        found = edited.score(PROMPTS, TARGETS)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.log_probs, b.log_probs, atol=0.5, rtol=0.1)
        now, then, never = (torch.cat([s.log_probs for s in each]) for each in (found, expected, unedited))
        assert (now - then).abs().sum() < (now - never).abs().sum()
