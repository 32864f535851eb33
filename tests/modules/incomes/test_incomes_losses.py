"""InComeS's losses and their gradients, against plain arithmetic on full logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from incomes_plain import TRAIN, batch_of, begin_with_bos, gradients, plain_losses, same_gradients, teacher_of

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.gist.batch import QueryConfig
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LossConfig


@pytest.mark.parametrize("reader", ["student", "original"])
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_losses_and_gradients_against_plain_arithmetic(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, reader: str, selection: str
) -> None:
    options: dict[str, Any] = {
        "train": train,
        "reader": reader,
        "gist": GistConfig(selection=selection, scale=3.0),  # type: ignore[arg-type]
        "loss": LossConfig(golden_weight=0.5, ce_weight=0.7, weight_scale=0.5, chunk=5),
    }
    module = build(**options)
    original = teacher_of(build, options)
    batch = batch_of(module, records, [0, 0, 0, 1])
    assert (batch.golden < 0).any()
    assert (batch.golden >= 0).any()
    expected = plain_losses(module, original, batch)
    found = module.losses(batch, batch.visible)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    same_gradients(module, expected["loss"], found["loss"])


@pytest.mark.parametrize("ce_on", ["answer", "all"])
@pytest.mark.parametrize("kl_on", ["answer", "all"])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_switches(build: Callable[..., InComeS], records: list[EditRecord], ce_on, kl_on, weighted) -> None:
    options = {"train": "upper", "loss": LossConfig(ce_on=ce_on, kl_on=kl_on, weighted=weighted)}
    module = build(**options)
    batch = batch_of(module, records)
    expected = plain_losses(module, teacher_of(build, options), batch)
    found = module.losses(batch, batch.visible)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("train", TRAIN)
def test_losses_with_a_tokenizer_that_adds_a_bos(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, bos: bool
) -> None:
    options: dict[str, Any] = {"train": train, "gist": GistConfig(bos=bos), "loss": LossConfig(golden_weight=0.5)}
    module = build(**options)
    begin_with_bos(module)
    batch = batch_of(module, records)
    assert bool((batch.queries[:, 0] == module.tokenizer.bos_token_id).all()) == bos
    expected = plain_losses(module, teacher_of(build, options), batch)
    for name, value in module.losses(batch, batch.visible).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2", "gpt_neox", "gptj"])
def test_losses_of_other_architectures(build: Callable[..., InComeS], records: list[EditRecord], kind: str) -> None:
    """Packed rows, positions and masks reach each architecture; GPT-2's dropout is in the student alone."""
    options = {"kind": kind, "train": "upper", "loss": LossConfig(golden_weight=0.5)}
    module = build(**options)
    module.gists.eval()
    original = teacher_of(build, options)
    batch = batch_of(module, records)
    expected = plain_losses(module, original, batch)
    for name, value in module.losses(batch, batch.visible).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_without_weights_and_distillation_no_teacher_is_asked(
    build: Callable[..., InComeS], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(loss=LossConfig(weighted=False, kl_weight=0.0, chunk=5))
    batch = batch_of(module, records, [0, 0, 0, 1])
    expected = plain_losses(module, module.teacher, batch)
    monkeypatch.setattr(module, "_teach", None)
    found = module.losses(batch, batch.visible)
    assert found.keys() == {"loss", "weighted_ce"}
    torch.testing.assert_close(found["loss"], expected["weighted_ce"], atol=1e-5, rtol=1e-4)
    same_gradients(module, expected["weighted_ce"], found["loss"])


def test_out_of_scope_rows_have_no_cross_entropy(build: Callable[..., InComeS], records: list[EditRecord]) -> None:
    for weighted in (True, False):
        module = build(
            queries=QueryConfig(rates={"locality": 1.0}),
            loss=LossConfig(weighted=weighted, golden_weight=1.0, ce_on="all"),
        )
        batch = batch_of(module, records)
        parts = module.losses(batch, batch.visible)
        assert parts["weighted_ce"] == 0
        assert parts["golden"] == 0
        assert parts["kl"] > 0
        assert parts["zero"] > 0
        assert all(torch.isfinite(g).all() for g in gradients(module, parts["loss"]).values())


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_splitting_a_batch_changes_nothing(build: Callable[..., InComeS], records: list[EditRecord], selection) -> None:
    """Two pools in a micro-batch, or a micro-batch each: the same loss and the same update."""
    module = build(gist=GistConfig(selection=selection), loss=LossConfig(golden_weight=0.5))
    batch = batch_of(module, records, [0, 0, 1, 1])
    whole = module.losses(batch, batch.visible)
    grads = gradients(module, whole["loss"])
    halves = [
        module.collator()([Slot(r, 0, 50 + i) for i, r in enumerate(records) if i // 2 == half]) for half in range(2)
    ]
    losses = [module.losses(b, b.visible) for b in halves]
    for name, value in whole.items():
        if name == "teacher_ce":  # a mean over queries in scope, of which the halves have more or fewer
            continue
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, value, atol=1e-6, rtol=1e-5)
    split = gradients(module, (losses[0]["loss"] + losses[1]["loss"]) / 2)
    for name, grad in grads.items():
        torch.testing.assert_close(split[name], grad, atol=1e-6, rtol=1e-3)
