"""The memory, the gate, what each model answers, and the soft mixture."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.asked import Asked
from modules.backbone import Backbone
from modules.editor import Edited
from modules.serac.editor import SeracEdited, SeracEditor
from modules.serac.losses import mix
from modules.serac.metrics import ScopeAccuracy, scope_answers
from modules.serac.model import SeracModel, same_tokens
from modules.training_free.icl import Unedited

EDITS = [EditRequest(f"City {s} is in", f"Land {i}", f"City {s}") for i, s in enumerate("ABC")]
INSIDE = ["City A is in", "City C is in"]
OUTSIDE = ["Who wrote Hamlet?", "The river through Oslo is", "Water boils at", "One and one are"]
TARGETS = ["Ann", "a long one", "Peru", "two"]


def edited_by(model: SeracModel, requests: list[EditRequest] = EDITS, soft: bool = False) -> SeracEdited:
    return SeracEdited(model, model.backbone, soft).add(requests)


def test_the_gate(tiny_serac: Callable[..., SeracModel]) -> None:
    edited = edited_by(tiny_serac())
    assert edited.edit_of([*OUTSIDE, "City B is in"]) == [None] * 4 + [EDITS[1]]
    scopes = edited.scope(["City B is in", "Water boils at"])
    assert scopes[0].similarity == pytest.approx(1.0, abs=1e-4)
    assert 0 <= scopes[1].similarity < 0.99
    # solved questions before a question are no part of what is asked
    asked = [Asked("City A is in\n", "Water boils at"), Asked("Where?\n", "City B is in")]
    assert edited.edit_of(asked) == [None, EDITS[1]]
    limit = scopes[1].similarity
    for threshold, inside in ((limit - 1e-3, True), (limit + 1e-3, False)):
        edited.model.scope.config.threshold = threshold
        assert (edited.edit_of(["Water boils at"])[0] is not None) == inside


def test_out_of_scope_nothing_changes_by_a_bit(tiny_serac: Callable[..., SeracModel]) -> None:
    model = tiny_serac()
    with Unedited().edit(model.backbone, []) as before:
        scores = before.score(OUTSIDE, TARGETS, top_k=3)
        texts = before.generate(OUTSIDE, 6)
    edited = edited_by(model)
    mixed = edited.score([*INSIDE, *OUTSIDE], ["Land 0", "Land 2", *TARGETS], top_k=3)
    for old, new in zip(scores, mixed[2:], strict=True):
        assert torch.equal(old.log_probs, new.log_probs)
        assert torch.equal(old.top, new.top)
    assert edited.generate([*INSIDE, *OUTSIDE], 6)[2:] == texts
    empty = edited_by(model, [])
    assert empty.generate([*INSIDE, *OUTSIDE], 6) == Edited(model.backbone).generate([*INSIDE, *OUTSIDE], 6)


def test_in_scope_the_counterfactual_model_has_read_the_edit(tiny_serac: Callable[..., SeracModel]) -> None:
    model = tiny_serac()
    found = edited_by(model).score([*OUTSIDE, *INSIDE], [*TARGETS, "Land 0", "Land 2"])[4:]
    told = [f"City {s} is in Land {i}. City {s} is in" for s, i in (("A", 0), ("C", 2))]
    expected = Edited(model.counterfactual).score(told, ["Land 0", "Land 2"])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.log_probs, b.log_probs)
        assert torch.equal(a.target, b.target)


def test_how_much_stands_before_a_prompt(tiny_serac: Callable[..., SeracModel]) -> None:
    model = tiny_serac()
    length = len("City A is in Land 0.")
    assert edited_by(model).context_tokens(["City A is in", "Water boils at"]) == [length, 0]
    assert edited_by(model, soft=True).context_tokens(["City A is in", "Water boils at"]) == [length, length]
    assert edited_by(model, []).context_tokens(["City A is in"]) == [0]


@pytest.mark.parametrize("soft", [False, True])
def test_generation_is_what_repeated_scoring_gives(tiny_serac: Callable[..., SeracModel], soft: bool) -> None:
    """With a cache, side by side and left-padded, or token by token anew: one scope a prompt, decided before."""
    model = tiny_serac(threshold=0.99 if not soft else 0.5)
    edited = edited_by(model, soft=soft)
    prompts = [*INSIDE, *OUTSIDE[:2]]
    together = edited.generate(prompts, 5)
    tokenizer = model.backbone.tokenizer
    for prompt, whole in zip(prompts, together, strict=True):
        assert edited.generate([prompt], 5) == [whole]
        edit, s = edited.scope([prompt])[0]
        assert edit is not None
        plain, read = (list(tokenizer(text)["input_ids"]) for text in (prompt, f"{edit.statement} {prompt}"))
        new: list[int] = []
        for _ in range(5):
            rows = (model.backbone, plain + new), (model.counterfactual, read + new)
            base, other = (backbone.model(torch.tensor([row])).logits[:, -1] for backbone, row in rows)
            logits = mix(torch.tensor([s]), base, other) if soft else other if s > 0.99 else base
            new.append(int(logits.argmax()))
        assert tokenizer.eos_token_id not in new
        assert whole == tokenizer.decode(new)


def test_soft_scores(tiny_serac: Callable[..., SeracModel]) -> None:
    model = tiny_serac(threshold=0.5)
    model.scope.config.similarity = "cosine"  # so that no similarity is near 0
    edited = edited_by(model, soft=True)
    prompts, targets = [*INSIDE, *OUTSIDE, ""], ["Land 0", "Peru", *TARGETS, "Sand"]
    found = edited.score(prompts, targets, batch_size=3, top_k=2)
    for prompt, target, score in zip(prompts[:-1], targets[:-1], found[:-1], strict=True):
        edit, s = edited.scope([prompt])[0]
        assert edit is not None
        assert 0.1 < s <= 1
        one = Edited(model.backbone).score([prompt], [target])[0]
        two = Edited(model.counterfactual).score([f"{edit.statement} {prompt}"], [target])[0]
        expected = ((1 - s) * one.log_probs.exp() + s * two.log_probs.exp()).log()
        torch.testing.assert_close(score.log_probs, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(score.target, one.target)
        assert torch.equal(score.top[:, 0], score.predicted)
    assert found[-1].target.tolist() == model.backbone.tokenizer("and")["input_ids"]  # nothing predicts the first token
    nothing = edited_by(model, [], soft=True)
    assert torch.equal(
        nothing.score(["Who"], ["me"])[0].log_probs, Edited(model.backbone).score(["Who"], ["me"])[0].log_probs
    )


def test_consecutive_edits_accumulate(tiny_serac: Callable[..., SeracModel]) -> None:
    model = tiny_serac()
    with SeracEditor(model).edit(model.backbone, EDITS[:1]) as first:
        assert first.edit_of(INSIDE) == [EDITS[0], None]
        with first.edit([*EDITS[1:], EDITS[0]]) as both:
            assert both.requests == tuple(EDITS)
            assert both.edit_of(INSIDE) == [EDITS[0], EDITS[2]]
            assert torch.equal(both.vectors[:1], first.vectors)
        assert first.edit_of(INSIDE) == [EDITS[0], None]
        once = edited_by(model)
        torch.testing.assert_close(both.vectors, once.vectors, rtol=1e-5, atol=1e-6)


def test_of_two_edits_of_one_prompt_the_later_counts(tiny_serac: Callable[..., SeracModel]) -> None:
    edited = edited_by(tiny_serac())
    again = EditRequest("City A is in", "Peru", "City A")
    with edited.edit([again]) as further:
        assert set(further.requests) == {again, *EDITS[1:]}
        assert further.edit_of(["City A is in"]) == [again]
        assert further.add([EDITS[0]]).edit_of(["City A is in"]) == [EDITS[0]]
    # within one call too, also where the last one is there already
    for asked in ([again, EDITS[0]], [EDITS[0], again]):
        for memory in (edited_by(edited.model, []), edited, edited.add([again])):
            assert memory.add(asked).edit_of(["City A is in"]) == [asked[-1]]
    texts = [EditRequest(text="Lyon is in Japan."), EditRequest(text="Lyon is in Peru.")]
    assert len(edited.add(texts).requests) == 5
    # zsRE's edits are questions that have a statement beside them
    told = [EditRequest("Where is Lyon?", land, "Lyon", text=f"Lyon is in {land}.") for land in ("Japan", "Peru")]
    for memory in (edited.add(told), edited.add(told[:1]).add(told[1:])):
        assert memory.requests == (*EDITS, told[1])
        assert memory.edit_of(["Where is Lyon?"]) == [told[1]]


@pytest.mark.parametrize("side", ["prompt", "statement"])
def test_which_side_of_an_edit_is_compared(tiny_serac: Callable[..., SeracModel], side: str) -> None:
    told = EditRequest("Where is Lyon?", "Peru", "Lyon", text="Lyon is in Peru.")
    free = EditRequest(text="Oslo is in Chad.")
    edited = edited_by(tiny_serac(edit_side=side), [told, free, EDITS[0]])
    asked = ["Where is Lyon?", "Lyon is in Peru.", "Oslo is in Chad.", "City A is in", "City A is in Land 0."]
    prompts = side == "prompt"
    wanted = [told if prompts else None, None if prompts else told, free]
    assert edited.edit_of(asked) == [*wanted, EDITS[0] if prompts else None, None if prompts else EDITS[0]]


def test_edits_are_removed(tiny_serac: Callable[..., SeracModel]) -> None:
    edited = edited_by(tiny_serac())
    fewer = edited.remove([EDITS[1]])
    assert fewer.requests == (EDITS[0], EDITS[2])
    assert fewer.edit_of(["City A is in", "City B is in", "City C is in"]) == [EDITS[0], None, EDITS[2]]
    assert fewer.remove(fewer.requests).edit_of(INSIDE) == [None, None]
    with pytest.raises(ValueError, match=r"not among the edits.*City B is in Land 1"):
        fewer.remove([EDITS[1]])


def test_edits_are_saved_and_loaded(tiny_serac: Callable[..., SeracModel], tmp_path: Path) -> None:
    model = tiny_serac()
    edited = edited_by(model)
    edited.save(tmp_path)
    loaded = edited_by(model, []).restored(tmp_path)
    assert loaded.requests == edited.requests
    assert torch.equal(loaded.vectors, edited.vectors)
    with loaded.edit([EditRequest("City D is in", "Peru", "City D")]) as more:
        assert len(more.requests) == 4
    with torch.no_grad():
        next(model.scope.parameters()).add_(1)
    with pytest.raises(ValueError, match=r"another scope classifier; make them again"):
        edited_by(model, []).restored(tmp_path)
    (tmp_path / "memory.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"memory\.safetensors cannot be read"):
        edited_by(model, []).restored(tmp_path)
    (tmp_path / "edits.json").unlink()
    with pytest.raises(ValueError, match=r"holds no edits\.json"):
        edited_by(model, []).restored(tmp_path)


def test_another_model_of_the_vocabulary_is_edited(
    tiny_serac: Callable[..., SeracModel], tiny: Callable[..., Backbone]
) -> None:
    model, other = tiny_serac(), tiny("qwen2")
    with SeracEditor(model).edit(other, EDITS) as edited:
        assert edited.generate(OUTSIDE, 4) == Edited(other).generate(OUTSIDE, 4)
        assert edited.generate(INSIDE, 4) == edited_by(model).generate(INSIDE, 4)
    other.tokenizer.add_tokens(["Lyon"])
    with pytest.raises(ValueError, match=r"does not share the vocabulary.*258 and 257 tokens; 'Lyon'"):
        SeracEditor(model).edit(other, EDITS).__enter__()


def test_tokenizers_that_cut_differently(tiny: Callable[..., Backbone]) -> None:
    one, other = tiny().tokenizer, tiny().tokenizer
    same_tokens(one, "one", other, "other")
    other.backend_tokenizer.pre_tokenizer = None  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"cut texts differently.*model\.counterfactual\.source"):
        same_tokens(one, "one", other, "other")


def test_scope_accuracy(tiny_serac: Callable[..., SeracModel], records: list[EditRecord]) -> None:
    model = tiny_serac()
    records = [*records, EditRecord("made/other", (EditRequest("Lyon is in", "Japan", "Lyon"),))]
    near = EditRecord(
        "made/near",
        (EditRequest("Rome is in", "Peru", "Rome"),),
        (Query("Rome is in", ("Peru",)),),
        {"near": (Query("Rome is in", ("Italy",)), Query("Lyon is in", ("France",)))},
    )
    records.append(near)
    edited = edited_by(model, [r.request for r in records])
    found = scope_answers(edited, records)
    # each own prompt; rephrases are others' texts, which this classifier finds unlike; near's are its own prompt
    assert found["in_scope"] == [True, False, False] * 4 + [True] + [True, True]
    # Lyon is another edit's subject: left out
    assert found["out_of_scope"] == [True] * 4 + [False]
    metric = ScopeAccuracy()
    metric.update(found)
    metric.update({"in_scope": [True], "out_of_scope": []})
    values = metric.compute()
    assert values["in_scope"] == pytest.approx(8 / 16)
    assert values["out_of_scope"] == pytest.approx(4 / 5)
    assert values["accuracy"] == pytest.approx((8 / 16 + 4 / 5) / 2)
    assert set(ScopeAccuracy().compute()) == set()
