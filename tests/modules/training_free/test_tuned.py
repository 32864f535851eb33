"""Editors that tune a change: many single edits at once are each by itself, and the change merges into weights."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import linear
from modules.training_free.ft import FTEAC, FTL, FTM, ElasticNet
from modules.training_free.lora import LoRA
from modules.training_free.prepared import Prepared, prepare_rows
from modules.training_free.shared import encode_targets
from modules.training_free.terms import Dense
from modules.training_free.tuned import TuningEditor

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


def loss(edited: Edited, requests: Sequence[EditRequest]) -> float:
    scores = edited.score([r.prompt for r in requests], [r.target for r in requests])
    return -float(torch.stack([s.log_probs.mean() for s in scores]).mean())


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_many_single_edits_at_once_are_each_by_itself(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str
) -> None:
    """In float64, three at a time, and with an early stop that comes at another step for each."""
    backbone = tiny(kind)
    backbone.model.double()
    losses = [loss(Edited(backbone), [r]) for r in requests]
    editor = type(EDITORS[name])(**vars(EDITORS[name]) | {"batch_size": 3, "stop_at": sum(losses) / len(losses)})
    together = editor.apart(backbone, requests)
    for one, request in zip(together, requests, strict=True):
        with editor.edit(backbone, [request]) as alone:
            for x, y in zip(alone.score(PROMPTS, TARGETS), one.score(PROMPTS, TARGETS), strict=True):
                torch.testing.assert_close(x.log_probs, y.log_probs, rtol=1e-4, atol=1e-5)
    if name in ("ft_m", "lora"):  # whose loss is what `loss` measures
        moved = [
            any(bool(t.d.any() if isinstance(t, Dense) else t.b.any()) for t in e.terms.values()) for e in together
        ]
        assert any(moved)
        assert not all(moved)


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_change_for_a_batch_and_its_merged_weights(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, name: str
) -> None:
    backbone = tiny(kind)
    with EDITORS[name].edit(backbone, requests) as edited:
        assert loss(edited, requests) < loss(Edited(backbone), requests)
        merged = Edited(Backbone(edited.merge(), backbone.tokenizer, backbone.config))
        assert merged.backbone.model is not backbone.model
        for layer, change in edited.weight_changes().items():
            after, old = (linear(m, layer).weight for m in (merged.backbone.model, backbone.model))
            moved = (after - old).T if kind == "llama" else after - old  # type: ignore[operator]
            whole = change if isinstance(change, torch.Tensor) else change.weight()[0]
            torch.testing.assert_close(moved, whole, rtol=1e-3, atol=1e-6)
        for x, y in zip(edited.score(PROMPTS, TARGETS), merged.score(PROMPTS, TARGETS), strict=True):
            torch.testing.assert_close(x.log_probs, y.log_probs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", EDITORS)
def test_a_batch_is_read_in_passes_of_little_padding(
    tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is tuned is what one pass of them all tunes; in float64."""
    backbone = tiny()
    backbone.model.double()
    long = [EditRequest("Far away " * n + "lies", "Peru") for n in (9, 8)]
    mixed = [long[0], *requests, long[1]]
    tokens: list[int] = []
    losses = Prepared.losses

    def counted(rows: Prepared, *given: Any) -> torch.Tensor:
        tokens.append(rows.ids.numel())
        return losses(rows, *given)

    def tuned() -> tuple[Edited, int]:
        tokens.clear()
        with EDITORS[name].edit(backbone, mixed) as edited:
            return edited, sum(tokens)

    monkeypatch.setattr(Prepared, "losses", counted)
    now, few = tuned()
    assert len(tokens) == 2 * EDITORS[name].steps
    monkeypatch.setattr(
        "modules.training_free.tuned.prepare", lambda backbone, rows, start, _: [prepare_rows(backbone, rows, start)]
    )
    expected, many = tuned()
    assert len(tokens) == EDITORS[name].steps
    real = sum(len(row.ids) - 1 for row in encode_targets(backbone, mixed)) * EDITORS[name].steps
    assert real < few < 1.1 * real < many
    for x, y in zip(now.score(PROMPTS, TARGETS), expected.score(PROMPTS, TARGETS), strict=True):
        torch.testing.assert_close(x.log_probs, y.log_probs, rtol=1e-4, atol=1e-5)


def test_a_loss_that_is_no_number_is_named(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    backbone = tiny()
    with torch.no_grad():
        next(iter(backbone.model.parameters())).fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="lower lr"), FTM().edit(backbone, requests):
        pass


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"lr": 0.0}, {"stop_at": -1.0}, {"batch_size": 0}])
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    for kind in (FTM, FTL, LoRA):
        with pytest.raises(ValueError, match=kind.name):
            kind(**wrong)
