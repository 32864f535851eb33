"""What holds of every editor that tunes or remembers: each architecture, nothing left behind, state, generation."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.records import EditRecord, EditRequest
from modules.backbone import PARTS, Backbone
from modules.editor import Edited
from modules.training_free import FTEAC, FTL, FTM, GRACE, KN, LoRA, TPatcher
from modules.training_free.ft import ElasticNet

KINDS = sorted(PARTS)
PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]
EDITORS: dict[str, Any] = {
    "ft_l": FTL(steps=5, lr=5e-3),
    "ft_m": FTM(steps=5, lr=5e-3, layers=[1, -1], modules="mlp", norm_constraint=0.02),
    "ft_eac": FTEAC(steps=5, lr=5e-3, net=ElasticNet(score_steps=2)),
    "lora": LoRA(steps=5),
    "adalora": LoRA(steps=8, lr=0.05, targets="qk", layers=[0.5], adalora=True),
    "grace": GRACE(steps=5, epsilon=1e-2),
    "grace_prompt": GRACE(layer=0, linear="first", steps=5, epsilon=1e-2, replace="prompt"),
    "t_patcher": TPatcher(steps=30, lr=0.05, samples=2, sample_tokens=4),
    "t_patcher_token": TPatcher(per="token", steps=30, lr=0.05, relu=True, texts=["The sky is blue.", "Who?"]),
    "kn": KN(steps=4, batch_size=6, threshold=0.1),
}
NAMES = list(EDITORS)


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [replace(record.request, old_target="Peru") for record in records]


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def loss(edited: Edited, requests: Sequence[EditRequest]) -> float:
    scores = edited.score([r.prompt for r in requests], [r.target for r in requests])
    return -float(torch.stack([s.log_probs.mean() for s in scores]).mean())


def clean(backbone: Backbone) -> bool:
    return not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_edited_and_left_as_it_was(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str
) -> None:
    backbone, editor = tiny(kind), EDITORS[name]
    next(iter(backbone.model.parameters())).requires_grad_(True)  # a flag to be left alone
    backbone.model.train()
    weights, rng = state(backbone.model), torch.get_rng_state()
    flags = [p.requires_grad for p in backbone.model.parameters()]

    def use() -> None:
        with editor.edit(backbone, requests[:1]) as edited:
            assert backbone.model.training
            backbone.model.eval()
            now, before = loss(edited, requests[:1]), loss(Edited(backbone), requests[:1])
            assert now < before - 0.02 if name != "kn" else now != before  # nothing is tuned there
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        use()
    assert all(map(torch.equal, weights, state(backbone.model)))
    assert torch.equal(rng, torch.get_rng_state())
    assert flags == [p.requires_grad for p in backbone.model.parameters()]
    assert all(p.grad is None for p in backbone.model.parameters())
    assert clean(backbone)


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_nothing_behind(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    backbone.model.train()
    weights, rng = state(backbone.model), torch.get_rng_state()
    monkeypatch.setattr("torch.autograd.grad", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"), EDITORS[name].edit(backbone, requests):
        pass
    assert all(map(torch.equal, weights, state(backbone.model)))
    assert torch.equal(rng, torch.get_rng_state())
    assert all(m.training for m in backbone.model.modules())
    assert clean(backbone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_and_restored_it_answers_the_same(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str, tmp_path: Path
) -> None:
    backbone, editor = tiny(kind), EDITORS[name]
    with editor.edit(backbone, requests) as edited:
        expected = edited.score(PROMPTS, TARGETS)
        edited.save(tmp_path)
        before = Edited(backbone).score(PROMPTS, TARGETS)
    with editor.edit(backbone, []) as empty:
        for x, y in zip(before, empty.score(PROMPTS, TARGETS), strict=True):
            assert torch.equal(x.log_probs, y.log_probs)
        loaded = empty.restored(tmp_path)
    assert loaded.requests == tuple(requests)
    for x, y in zip(expected, loaded.score(PROMPTS, TARGETS), strict=True):
        assert torch.equal(x.log_probs, y.log_probs)
    assert not torch.allclose(expected[0].log_probs, before[0].log_probs)


@pytest.mark.parametrize("name", ["ft_m", "lora", "grace", "t_patcher"])
def test_state_of_another_method_or_model_is_refused(
    tiny: Callable[..., Backbone], requests: list[EditRequest], tmp_path: Path, name: str
) -> None:
    with EDITORS[name].edit(tiny(), requests[:1]) as edited:
        edited.save(tmp_path)
    with EDITORS["ft_l"].edit(tiny(), []) as other, pytest.raises(ValueError, match=f"made by {name}, not by ft_l"):
        other.restored(tmp_path)
    larger = tiny(hidden_size=40, intermediate_size=40, head_dim=10)
    with EDITORS[name].edit(larger, []) as wide, pytest.raises(ValueError, match="another size"):
        wide.restored(tmp_path)
    with EDITORS[name].edit(tiny(), []) as empty, pytest.raises(ValueError, match="holds no edits"):
        empty.restored(tmp_path / "none")


@pytest.mark.parametrize("name", NAMES)
def test_further_edits_on_top(tiny: Callable[..., Backbone], requests: list[EditRequest], name: str) -> None:
    backbone = tiny()
    with EDITORS[name].edit(backbone, requests[:2]) as first:
        with first.edit([*requests[1:3], requests[2]]) as more:  # one of them is there, one is given twice
            assert more.requests == tuple(requests[:3])
            if name != "kn":
                assert loss(more, requests[2:3]) < loss(first, requests[2:3])
        with first.edit(requests[:1]) as again:
            assert [s.log_probs.tolist() for s in again.score(PROMPTS, TARGETS)] == [
                s.log_probs.tolist() for s in first.score(PROMPTS, TARGETS)
            ]


@pytest.mark.parametrize("name", ["grace", "grace_prompt", "t_patcher", "t_patcher_token", "kn"])
def test_an_edit_that_is_removed_was_never_there(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    backbone = tiny()
    with EDITORS[name].edit(backbone, requests[:1]) as alone, alone.edit(requests[1:3]) as three:
        left = three.remove(requests[1:3])
        assert left.requests == alone.requests
        for x, y in zip(left.score(PROMPTS, TARGETS), alone.score(PROMPTS, TARGETS), strict=True):
            torch.testing.assert_close(x.log_probs, y.log_probs)
        none = three.remove(requests[:3])
        assert none.requests == ()
        for x, y in zip(none.score(PROMPTS, TARGETS), Edited(backbone).score(PROMPTS, TARGETS), strict=True):
            torch.testing.assert_close(x.log_probs, y.log_probs)
        with pytest.raises(ValueError, match="not among the edits"):
            three.remove(requests[3:])


@pytest.mark.parametrize("name", NAMES)
def test_cached_and_left_padded_generation_is_the_plain_one(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    """The plain one reads the prompt and all new tokens again at each step, alone and without padding."""
    backbone = tiny()
    prompts = [requests[0].prompt, *PROMPTS[1:]]
    with EDITORS[name].edit(backbone, requests) as edited:
        texts = edited.generate(prompts, max_new_tokens=5)
        for prompt, text in zip(prompts, texts, strict=True):
            new: list[int] = []
            for _ in range(5):
                ids = [*backbone.tokenizer(prompt)["input_ids"], *new]
                given = torch.tensor([ids])
                if name.startswith("grace"):
                    edited._last = torch.tensor([len(ids) - len(new) - 1])  # what scoring does: the prompt ends there
                hidden = edited.decode(given, torch.ones_like(given))[0].last_hidden_state
                new.append(int(backbone.logits(hidden[0, -1]).argmax()))
            assert backbone.tokenizer.decode(new, skip_special_tokens=True) == text
        if name.startswith("grace"):
            edited._last = None


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_meet(tiny: Callable[..., Backbone], requests: list[EditRequest], name: str) -> None:
    with EDITORS[name].edit(tiny(), requests) as edited:
        together = edited.score(PROMPTS, TARGETS)
        for i, score in enumerate(together):
            alone = edited.score(PROMPTS[i : i + 1], TARGETS[i : i + 1])[0]
            torch.testing.assert_close(score.log_probs, alone.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_within_inference_mode_and_autocast(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    backbone, editor = tiny(), EDITORS[name]
    with editor.edit(backbone, requests[:1]) as plain:
        expected = loss(plain, requests[:1])
    with torch.inference_mode(), editor.edit(backbone, requests[:1]) as edited:
        assert loss(edited, requests[:1]) == expected
        with edited.edit(requests[1:2]) as more:  # what was made there can be built on
            pass
    with more.edit(requests[2:3]) as last:
        assert len(last.requests) == 3
    with torch.autocast("cpu", torch.bfloat16), editor.edit(backbone, requests[:1]) as edited:
        now = loss(edited, requests[:1])
        assert now == pytest.approx(expected, abs=0.3)
        assert abs(now - expected) < abs(now - loss(Edited(backbone), requests[:1]))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_half_precision(tiny: Callable[..., Backbone], requests: list[EditRequest], name: str) -> None:
    backbone = tiny()
    backbone.model.bfloat16()
    weights = state(backbone.model)
    with EDITORS[name].edit(backbone, requests[:2]) as edited:
        now = loss(edited, requests[:2])
        before = loss(Edited(backbone), requests[:2])
        assert now != before if name == "kn" else now < before  # what KN erases may have been for or against
    assert all(map(torch.equal, weights, state(backbone.model)))


@pytest.mark.parametrize("name", NAMES)
def test_free_text_is_refused_before_any_work(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    monkeypatch.setattr(type(backbone.model.base_model), "forward", lambda *_, **__: pytest.fail("worked"))
    free = [*requests, EditRequest(text="City A has moved.")]
    with pytest.raises(ValueError, match="free text"), EDITORS[name].edit(backbone, free):
        pass
