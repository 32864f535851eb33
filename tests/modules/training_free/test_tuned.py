"""What all editors that tune a change have in common: each architecture, nothing left behind, many at once, state."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited
from modules.training_free.ft import FTEAC, FTL, FTM, ElasticNet
from modules.training_free.lora import LoRA
from modules.training_free.shared import layer_numbers
from modules.training_free.tuned import Dense, Tuned, TuningEditor

KINDS = ["llama", "qwen2", "qwen3", "gpt2", "gpt_neox", "gptj"]
PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]
EDITORS: dict[str, TuningEditor] = {
    "ft_l": FTL(steps=5, lr=5e-3),
    "ft_m": FTM(steps=5, lr=5e-3, layers=[1, -1], modules="mlp", norm_constraint=0.02),
    "ft_eac": FTEAC(steps=5, lr=5e-3, net=ElasticNet(score_steps=2)),
    "lora": LoRA(steps=5),
    "adalora": LoRA(steps=8, lr=0.05, targets="qk", layers=[0.5], adalora=True),
}


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [record.request for record in records]


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in model.state_dict().values()]


def loss(edited: Edited, requests: Sequence[EditRequest]) -> float:
    scores = edited.score([r.prompt for r in requests], [r.target for r in requests])
    return -float(torch.stack([s.log_probs.mean() for s in scores]).mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", EDITORS)
def test_every_architecture_learns_and_is_left_as_it_was(
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
            assert loss(edited, requests[:1]) < loss(Edited(backbone), requests[:1]) - 0.02
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        use()
    assert all(map(torch.equal, weights, state(backbone.model)))
    assert torch.equal(rng, torch.get_rng_state())
    assert flags == [p.requires_grad for p in backbone.model.parameters()]
    assert all(p.grad is None for p in backbone.model.parameters())
    assert not any(m._forward_hooks for m in backbone.model.modules())


@pytest.mark.parametrize("name", EDITORS)
def test_a_failure_leaves_nothing_behind(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    weights, rng = state(backbone.model), torch.get_rng_state()
    monkeypatch.setattr("torch.optim.Adam.step", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
    with pytest.raises(RuntimeError, match="broken"), EDITORS[name].edit(backbone, requests):
        pass
    assert all(map(torch.equal, weights, state(backbone.model)))
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(m._forward_hooks for m in backbone.model.modules())


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_single_edits_at_once_are_each_by_itself(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str
) -> None:
    """In float64 and with an early stop that comes at another step for each."""
    backbone = tiny(kind)
    backbone.model.double()
    editor = EDITORS[name]
    losses = [loss(Edited(backbone), [r]) for r in requests]
    few = type(editor)(**vars(editor) | {"batch_size": 3, "stop_at": sum(losses) / len(losses)})
    together = few.apart(backbone, requests)
    for one, request in zip(together, requests, strict=True):
        with few.edit(backbone, [request]) as alone:
            a = alone.score(PROMPTS, TARGETS)
            b = one.score(PROMPTS, TARGETS)
            for x, y in zip(a, b, strict=True):
                torch.testing.assert_close(x.log_probs, y.log_probs, rtol=1e-4, atol=1e-5)
    if name in ("ft_m", "lora"):  # whose loss is what `loss` measures
        moved = [
            any(bool(t.d.any() if isinstance(t, Dense) else t.b.any()) for t in e.terms.values()) for e in together
        ]
        assert any(moved)
        assert not all(moved)


@pytest.mark.parametrize("name", EDITORS)
def test_one_change_for_a_batch_and_further_edits_on_top(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    backbone = tiny()
    with EDITORS[name].edit(backbone, requests[:2]) as first:
        assert loss(first, requests[:2]) < loss(Edited(backbone), requests[:2])
        with first.edit([*requests[1:3], requests[2]]) as more:
            assert more.requests == tuple(requests[:3])
            assert loss(more, requests[2:3]) < loss(first, requests[2:3])
            assert {n: t.__class__ for n, t in more.terms.items()} == {n: t.__class__ for n, t in first.terms.items()}
        with first.edit(requests[:1]) as again:
            assert again is first
        assert first.remove([]) is first
        with pytest.raises(ValueError, match="cannot remove single edits"):
            first.remove(requests[:1])


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_saved_loaded_and_merged_it_answers_the_same(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str, tmp_path: Path
) -> None:
    backbone, editor = tiny(kind), EDITORS[name]
    with editor.edit(backbone, requests) as edited:
        expected = edited.score(PROMPTS, TARGETS)
        edited.save(tmp_path)
        merged = Edited(Backbone(edited.merge(), backbone.tokenizer, backbone.config))
        before = Edited(backbone).score(PROMPTS, TARGETS)
    loaded = Tuned.load(editor, backbone, tmp_path)
    assert loaded.requests == tuple(requests)
    for x, y, z, old in zip(
        expected, loaded.score(PROMPTS, TARGETS), merged.score(PROMPTS, TARGETS), before, strict=True
    ):
        assert torch.equal(x.log_probs, y.log_probs)
        torch.testing.assert_close(x.log_probs, z.log_probs, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(x.log_probs, old.log_probs)


def test_state_of_another_method_or_model_is_refused(
    tiny: Callable[..., Backbone], requests: list[EditRequest], tmp_path: Path
) -> None:
    with EDITORS["ft_m"].edit(tiny(), requests[:1]) as edited:
        edited.save(tmp_path)
    with pytest.raises(ValueError, match="made by ft_m, not by ft_l"):
        Tuned.load(EDITORS["ft_l"], tiny(), tmp_path)
    with pytest.raises(ValueError, match="another size"):
        Tuned.load(EDITORS["ft_m"], tiny(intermediate_size=40), tmp_path)
    with pytest.raises(ValueError, match="holds no edits"):
        Tuned.load(EDITORS["ft_m"], tiny(), tmp_path / "none")


@pytest.mark.parametrize("name", EDITORS)
def test_cached_and_left_padded_generation_is_the_plain_one(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    backbone = tiny()
    with EDITORS[name].edit(backbone, requests) as edited:
        texts = edited.generate(PROMPTS, max_new_tokens=5)
        for prompt, text in zip(PROMPTS, texts, strict=True):
            ids = backbone.tokenizer(prompt, return_tensors="pt")["input_ids"]
            new: list[int] = []
            for _ in range(5):
                hidden = edited.decode(ids, torch.ones_like(ids))[0].last_hidden_state
                new.append(int(backbone.logits(hidden[0, -1]).argmax()))
                ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
            assert backbone.tokenizer.decode(new, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", EDITORS)
def test_within_inference_mode_and_autocast(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    backbone = tiny()
    with EDITORS[name].edit(backbone, requests[:1]) as plain:
        expected = loss(plain, requests[:1])
    with torch.inference_mode(), EDITORS[name].edit(backbone, requests[:1]) as edited:
        assert loss(edited, requests[:1]) == expected
        with edited.edit(requests[1:2]) as more:  # what was made there can be built on
            assert loss(more, requests[1:2]) < loss(edited, requests[1:2])
        apart = EDITORS[name].apart(backbone, requests[:1])[0]
        assert len(apart.add(requests[1:2]).requests) == 2
    with torch.autocast("cpu", torch.bfloat16), EDITORS[name].edit(backbone, requests[:1]) as edited:
        assert abs(loss(edited, requests[:1]) - expected) < 0.2


@pytest.mark.parametrize("name", EDITORS)
def test_free_text_is_refused_before_any_work(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, editor = tiny(), EDITORS[name]
    monkeypatch.setattr(TuningEditor, "tune", lambda *_, **__: pytest.fail("worked"))
    free = [*requests, EditRequest(text="City A has moved.")]
    with pytest.raises(ValueError, match="free text"), editor.edit(backbone, free):
        pass
    with pytest.raises(ValueError, match="free text"):
        editor.apart(backbone, free)


def test_a_loss_that_is_no_number_is_named(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    backbone = tiny()
    with torch.no_grad():
        next(iter(backbone.model.parameters())).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="lower lr"), FTM().edit(backbone, requests):
        pass


def test_layers_by_number_from_the_end_and_by_depth() -> None:
    assert layer_numbers([0, -1, 2], 10) == [0, 2, 9]
    assert layer_numbers([0.0, 0.5, 1.0], 11) == [0, 5, 10]
    assert layer_numbers([3, -7], 10) == [3]
    for wrong in ([10], [-11], [1.5], [-0.5], []):
        with pytest.raises(ValueError, match="layers"):
            layer_numbers(wrong, 10)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"stop_at": -1.0}, {"batch_size": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    for kind in (FTM, FTL, LoRA):
        with pytest.raises(ValueError, match=kind.name):
            kind(**wrong)
