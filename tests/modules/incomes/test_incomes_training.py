"""InComeS in training: what is trained, what reads, and what a step leaves as it was."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from incomes_plain import TRAIN, batch_of, gradients

from datamodules.records import EditRecord
from modules.editor import Edited
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LossConfig


@pytest.mark.parametrize("reader", ["student", "original"])
@pytest.mark.parametrize("train", TRAIN)
def test_what_is_trained_and_what_is_not(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, reader: str
) -> None:
    module = build(train=train, reader=reader, loss=LossConfig(golden_weight=0.5))
    batch = batch_of(module, records)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    for name in trained:
        inside = name.removeprefix("model.")
        if inside.startswith("language_model."):
            if train == "lora":
                assert "lora_" in inside
            elif train == "upper":
                assert ".layers.2." in inside or ".layers.3." in inside or ".norm." in inside
    before = {n: p.clone() for n, p in module.named_parameters()}
    outside = [t.clone() for t in module._outside["teacher"].parameters()] if train != "lora" else []
    with module.original() as original:
        ids = torch.arange(20)[None]
        answers = original.model(ids).logits
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module.losses(batch, batch.visible)["loss"].backward()
        optimizer.step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trained
    never = {n for n in trained if n not in moved}
    if reader == "student":
        assert not never
    else:  # what comes after the last layer's keys and values is not trained, so DDP waits for no gradient of it
        assert not never
        assert not any(f".layers.3.{part}" in n for n in trained for part in ("mlp", "self_attn.q", "self_attn.o"))
        assert any("k_proj" in n for n in moved)
        assert any("v_proj" in n for n in moved)
    with module.original() as original:
        assert torch.equal(original.model(ids).logits, answers)
    if train != "lora":
        teacher = module._outside["teacher"]
        assert all(torch.equal(a, b) for a, b in zip(outside, teacher.parameters(), strict=True))
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.training
        assert not any(n.startswith("_outside") or "teacher" in n for n in module.state_dict())


@pytest.mark.parametrize("train", TRAIN)
@torch.no_grad()
def test_original_reader_answers_as_the_original_where_nothing_is_read(
    build: Callable[..., InComeS], records: list[EditRecord], train: str
) -> None:
    module = build(train=train, reader="original", gist=GistConfig(selection="hidden"))
    batch = batch_of(module, records)
    model = module.gists.eval()
    pool = model.compress(batch.edits, batch.edits_mask)
    ids, mask = batch.queries, batch.queries_mask
    with module.original() as original:
        expected = original.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert not torch.equal(model(ids, mask, pool)[0].last_hidden_state, expected)
    assert model.matcher is not None
    model.matcher.threshold.fill_(torch.inf)
    assert torch.equal(model(ids, mask, pool)[0].last_hidden_state, expected)
    assert torch.equal(model(ids, mask, None)[0].last_hidden_state, expected)
    with module.original() as original:
        expected_scores = Edited(original, bos=False).score(["City A is in"], ["Land 0"])
    with module.editor().edit(model.backbone, [r.request for r in records]) as edited:  # through the head as well
        (found,), (wanted,) = edited.score(["City A is in"], ["Land 0"]), expected_scores
        assert torch.equal(found.log_probs, wanted.log_probs)


@torch.no_grad()
def test_adapters_reach_the_gists_keys(build: Callable[..., InComeS], records: list[EditRecord]) -> None:
    """A gist's key is what the adapted projection gives, not what the projection under the adapter gives."""
    module = build(train="lora")
    model = module.gists.eval()
    batch = batch_of(module, records[:1])
    ids = batch.edits
    embeds = torch.cat([model.backbone.embed(ids), model.gist_embedding[None, None]], dim=1)
    projected = {}
    for i in model.active:
        keys = model.backbone.attention(i).get_submodule("k_proj")
        keys.register_forward_hook(lambda _, __, out, i=i: projected.update({i: out[0, -1].unflatten(0, (2, 8))}))
    model.language_model.base_model(inputs_embeds=embeds)
    pool = model.compress(ids, batch.edits_mask)
    for i in model.active:
        torch.testing.assert_close(pool.layers[i].keys[0], projected[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("train", TRAIN)
def test_teaching_restores_modes_and_adapters_after_an_exception(build: Callable[..., InComeS], train: str) -> None:
    module = build(train=train)
    assert module.gists.language_model.training
    with pytest.raises(RuntimeError, match="inside"), module.teaching() as teacher:  # noqa: PT012 (what is inside raises on purpose)
        assert not teacher.training
        raise RuntimeError("inside")
    assert module.gists.language_model.training


@pytest.mark.parametrize("selection", ["qk", "hidden"])
@pytest.mark.parametrize("train", ["full", "upper"])
def test_gradient_checkpointing_gives_the_same_gradients(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, selection
) -> None:
    found = []
    for on in (False, True):
        module = build(
            train=train,
            gist=GistConfig(selection=selection),
            loss=LossConfig(golden_weight=0.5),
            gradient_checkpointing=on,
        )
        assert module.gists.language_model.is_gradient_checkpointing == on
        batch = batch_of(module, records)
        found.append(gradients(module, module.losses(batch, batch.visible)["loss"]))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_gradient_checkpointing_reaches_an_original_reader(
    build: Callable[..., InComeS], records: list[EditRecord], selection
) -> None:
    """Its layers that gradients come through are run again, and those below them are not."""
    found, ran = [], []
    for on in (False, True):
        module = build(
            train="upper",
            reader="original",
            gist=GistConfig(selection=selection),
            loss=LossConfig(golden_weight=0.5),
            gradient_checkpointing=on,
        )
        batch, reader = batch_of(module, records), module.gists.reader
        loss = module.losses(batch, batch.visible)["loss"]
        assert not any(part.training for part in reader.model.modules())
        again: list[int] = []
        for i in range(len(reader.layers)):
            reader.attention(i).register_forward_hook(lambda *_, i=i, again=again: again.append(i))
        found.append(gradients(module, loss))
        ran.append(sorted(again))
        module.losses(batch, batch.visible)  # and so it is left as it was
        assert not reader.model.is_gradient_checkpointing
    assert ran == [[], [*module.gists.active]]
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_is_refused_where_it_cannot_work(build: Callable[..., InComeS]) -> None:
    for options in ({"train": "lora", "reader": "original"},):
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            build(gradient_checkpointing=True, **options)


def test_visible_warm_up(build: Callable[..., InComeS], records: list[EditRecord], monkeypatch) -> None:
    module = build(visible_warmup_steps=10)
    batch = batch_of(module, records * 8)  # 4 distinct edits, 96 queries
    own = F.one_hot(batch.golden.clamp(min=0), len(batch.edits)).bool() & (batch.golden >= 0)[:, None]
    shares = []
    for step in (0, 5, 10):
        monkeypatch.setattr(InComeS, "global_step", property(lambda _, step=step: step))
        visible = module.visible(batch)
        assert torch.equal(visible, module.visible(batch))
        assert (visible | ~own).all()
        assert not (visible & ~batch.visible).any()
        shares.append(float(visible[~own].float().mean()))
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.7
    assert shares[2] == 1
