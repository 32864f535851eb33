"""COMEBA-HK: hook layers against plain z-scores, under padding, in short prompts and token by token; its state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from datamodules.tokens import pad
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import LowRank
from modules.training_free import CoachHook
from modules.training_free.coachhook import PEAK, HookedEdited
from modules.training_free.hook_layer import Gate, Scope, gated
from modules.training_free.second_moments import Moments
from modules.training_free.subject import row
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions

DOWN = "model.layers.1.mlp.down_proj"
OPEN = Scope(alpha=-10.0, dynamic=False, short=None)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., CoachHook]:
    def make(**options: Any) -> CoachHook:
        given: dict[str, Any] = {
            "layers": [1, 2],
            "moments": Moments(tokens=400, length=40, folder=str(tmp_path)),
            "contexts": Contexts(counts={8: 2}),
            "values": ValueOptions(steps=8, lr=0.2),
            "batch": 2,
        }
        return CoachHook(**(given | options))

    return make


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [r.request for r in records]


def term(d_in: int = 6, d_out: int = 5, rank: int = 2) -> LowRank:
    draw = torch.Generator().manual_seed(1)
    return LowRank(*(torch.randn(1, rank, d, generator=draw) for d in (d_in, d_out)))


def plain_scores(norms: np.ndarray) -> np.ndarray:
    return (norms - norms.mean()) / norms.std(ddof=1)


def run(gate: Gate, x: Tensor, real: Tensor, more: bool = False) -> Tensor:
    gate.begin(real, more)
    return gate(torch.nn.Identity(), (x,), torch.zeros(*x.shape[:2], gate.term.b.shape[2]))


# ---------------------------------------------------------------------- a hook layer


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_hook_layer_is_a_plain_z_score_whatever_the_padding(side: str) -> None:
    sizes = (9, 4, 1, 7)
    rows = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in sizes]
    x = 50 * torch.ones(4, 9, 6)  # padding that would stand out
    real = torch.zeros(4, 9, dtype=torch.bool)
    for i, r in enumerate(rows):
        where = slice(0, len(r)) if side == "right" else slice(9 - len(r), 9)
        x[i, where], real[i, where] = r, True
    scope = Scope(alpha=0.8, dynamic=False, short=None)
    gate = Gate(term(), 0.8, scope)
    out = run(gate, x, real)
    fired = 0
    for i, r in enumerate(rows):
        change = gate.term(r[None])[0]
        z = plain_scores(change.norm(dim=-1).numpy()) if len(r) > 1 else np.full(1, -np.inf)  # one token never passes
        expected = torch.where(torch.from_numpy(z >= 0.8)[:, None], change, torch.zeros(()))
        torch.testing.assert_close(out[i][real[i]], expected)
        assert out[i][~real[i]].abs().sum() == 0
        fired += int((z >= 0.8).sum())
    assert fired == int(gate.open.sum()) > 2


def test_one_token_at_a_time_is_judged_by_the_sequence_so_far() -> None:
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))
    x[:, 6] *= 9  # stands out when it comes
    gate = Gate(term(), 1.5, Scope(alpha=1.5, dynamic=False, short=None))
    run(gate, x[:, :5], torch.tensor([[0, 1, 1, 1, 1], [1] * 5]).bool())
    opened = []
    for t in range(5, 8):
        out = run(gate, x[:, t : t + 1], torch.ones(2, 1, dtype=torch.bool), more=True)
        opened.append((out != 0).any(-1)[:, 0].tolist())
        for i, first in enumerate((1, 0)):
            norms = gate.term(x[i : i + 1, first : t + 1])[0].norm(dim=-1).numpy()
            assert float(gate.scores[i, 0]) == pytest.approx(plain_scores(norms)[-1], rel=1e-5)
    assert opened == [[False, False], [True, True], [False, False]]


def test_short_prompts_are_judged_by_what_their_length_allows() -> None:
    """Of 5 tokens none has a z-score above 4 / sqrt(5) = 1.79, so that alpha = 2.2 could never be reached."""
    x = torch.ones(1, 5, 6) + 0.01 * torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    x[0, 2] *= 30
    real = torch.ones(1, 5, dtype=torch.bool)
    for short, opens in ((None, False), (0.95, True)):
        gate = Gate(term(), 2.2, Scope(short=short))
        run(gate, x, real)
        assert float(gate.scores.max()) == pytest.approx(4 / 5**0.5, rel=1e-3)
        assert gate.open.tolist() == [[False, False, opens, False, False]]


def test_two_tokens_say_nothing() -> None:
    """One of two always has the highest score there can be, whatever the text is about."""
    x = torch.randn(1, 3, 6, generator=torch.Generator().manual_seed(0))
    for length, opens in ((2, False), (3, True)):
        for scope in (Scope(short=0.5), Scope(alpha=0.5, relative=True)):
            gate = Gate(term(), scope.alpha, scope)
            run(gate, x[:, :length], torch.ones(1, length, dtype=torch.bool))
            assert bool(gate.open.any()) is opens


def test_the_first_token_can_be_left_out() -> None:
    x = torch.ones(1, 9, 6) + 0.05 * torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(0))
    x[0, 0] *= 100  # what a text begins with
    x[0, 5] *= 5  # what was edited
    real = torch.ones(1, 9, dtype=torch.bool)
    for first, opened in ((0, 0), (1, 5)):
        gate = Gate(term(), 2.2, Scope(first=first))
        run(gate, x, real)
        assert gate.open.nonzero()[:, 1].tolist() == [opened]


def test_relative_scores_do_not_depend_on_the_length() -> None:
    """What stands out as far as it can has the score 1 at any length, so that a short edit lowers no threshold."""
    for size in (3, 6, 40):
        x = torch.ones(1, size, 6) + 1e-4 * torch.randn(1, size, 6, generator=torch.Generator().manual_seed(0))
        x[0, 1] *= 30
        gate = Gate(term(), 0.9, Scope(alpha=0.9, relative=True))
        run(gate, x, torch.ones(1, size, dtype=torch.bool))
        assert float(gate.scores.max()) == pytest.approx(1.0, abs=1e-3)
        assert gate.open.nonzero()[:, 1].tolist() == [1]
    alone = Gate(term(), 0.0, Scope(alpha=0.0, relative=True))  # a single token has no score
    assert run(alone, torch.ones(1, 1, 6), torch.ones(1, 1, dtype=torch.bool)).abs().sum() == 0


def test_tokens_that_are_all_alike_open_nothing() -> None:
    gate = Gate(term(), 0.0, Scope(alpha=0.0))
    assert run(gate, torch.ones(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)).abs().sum() == 0
    empty = Gate(LowRank(torch.zeros(1, 1, 6), torch.zeros(1, 1, 5)), 0.0, Scope(alpha=0.0))  # W_h = W_0
    assert run(empty, torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)).isfinite().all()


def test_float16_layers_never_round_what_has_gathered() -> None:
    gate = Gate(term(), -10.0, OPEN)
    x = torch.randn(1, 4, 6).half()
    gate.begin(torch.ones(1, 4, dtype=torch.bool), False)
    out = gate(torch.nn.Identity(), (x,), torch.zeros(1, 4, 5, dtype=torch.float16))
    assert out.dtype == torch.float16
    assert gate.term.a.dtype == torch.float32
    torch.testing.assert_close(out, gate.term(x.float()).half())


# ---------------------------------------------------------------------- the editor


def test_open_gates_are_plain_deltas_and_closed_ones_nothing(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone = tiny()
    prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
    with build(scope=OPEN).edit(backbone, requests) as edited:
        assert isinstance(edited, HookedEdited)
        weights = super(HookedEdited, edited).applied  # low_rank of all terms, no gate
        with weights():
            expected = Edited(backbone).score(prompts, targets)
        for found, want in zip(edited.score(prompts, targets), expected, strict=True):
            torch.testing.assert_close(found.log_probs, want.log_probs, rtol=1e-4, atol=1e-5)
        edited.editor = build(scope=Scope(alpha=100.0, dynamic=False, short=None))
        unedited = Edited(backbone).score(prompts, targets)
        for found, want in zip(edited.score(prompts, targets), unedited, strict=True):
            torch.testing.assert_close(found.log_probs, want.log_probs)


def test_batches_in_a_call_are_calls_one_after_another(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone, editor = tiny(), build()
    with (
        editor.edit(backbone, requests) as at_once,
        editor.edit(backbone, requests[:2]) as first,
        first.edit(requests[2:]) as both,
        build(batch=4).edit(backbone, requests) as one_batch,
    ):
        for name in editor.names(backbone):
            torch.testing.assert_close(both.deltas[name].b, at_once.deltas[name].b)
            torch.testing.assert_close(both.deltas[name].a, at_once.deltas[name].a)
            assert not torch.allclose(one_batch.deltas[name].b, at_once.deltas[name].b, atol=1e-4)
        assert both.alphas() == at_once.alphas()


def test_the_threshold_follows_the_edits(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """On activations of the unedited model, as released: each edit's highest z-score, the lowest of them counts."""
    backbone = tiny()
    scope = Scope(alpha=9.0)
    with build(scope=scope, batch=4).edit(backbone, requests) as edited:
        for name in edited.terms:
            peaks = []
            for r in requests:
                inputs: list[Tensor] = []
                layer: Any = backbone.model.get_submodule(name)
                handle = layer.register_forward_pre_hook(lambda _, args, into=inputs: into.append(args[0]))
                with torch.no_grad():
                    backbone.model(input_ids=torch.tensor([row(backbone, r.prompt, str(r.subject)).ids]))
                handle.remove()
                peaks.append(plain_scores(edited.terms[name](inputs[0])[0].norm(dim=-1).numpy()).max())
            np.testing.assert_allclose(edited.memory[PEAK + name], peaks, rtol=1e-4)
            assert edited.alphas()[name] == pytest.approx(min(peaks) * (1 - 1e-4), rel=1e-4)
        lowest = int(edited.memory[PEAK + name].argmin())
        less = edited.remove([requests[lowest]])
        assert less.alphas()[name] > edited.alphas()[name]  # taking the edit out takes its threshold back
    with build(scope=replace(scope, dynamic=False)).edit(backbone, requests) as fixed:
        assert set(fixed.alphas().values()) == {9.0}
    with build(scope=replace(scope, cover=0.5)).edit(backbone, requests) as half:
        peaks = half.memory[PEAK + name]
        middle = float(peaks.double().median() + peaks.double().sort()[0][2]) / 2
        assert half.alphas()[name] == pytest.approx(middle * (1 - 1e-4))


def test_the_edit_that_decides_the_threshold_passes(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """Also where it is read in a batch of another shape, which rounds otherwise."""
    backbone = tiny()
    for request in requests:
        with build(layers=[1], scope=Scope(alpha=9.0, short=None)).edit(backbone, [request]) as edited:
            assert isinstance(edited, HookedEdited)
            asked = row(backbone, request.prompt, str(request.subject)).ids
            for others in ([], requests):
                rows = [asked, *(row(backbone, r.prompt, str(r.subject)).ids for r in others)]
                ids, mask = pad(rows, 256)
                gates = edited.gates()
                with gated(backbone, gates):
                    backbone.model(input_ids=ids, attention_mask=mask)
                assert gates[DOWN].open[0].any()


@pytest.mark.parametrize("on", ["original", "edited"])
def test_calibrated_at_the_subject_every_edit_passes(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest], on: Any
) -> None:
    """With thresholds taken on the edited model, each edit's subject passes in each layer when its prompt is read."""
    backbone = tiny()
    rows = [row(backbone, r.prompt, str(r.subject)) for r in requests]
    ids, mask = pad([r.ids for r in rows], 256)
    scope = Scope(alpha=9.0, calibrate="subject", calibrate_on=on)
    with build(scope=scope, batch=4).edit(backbone, requests) as edited:
        assert isinstance(edited, HookedEdited)
        gates = edited.gates()
        with torch.no_grad(), gated(backbone, gates):
            backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        opened = [gate.scores[i, r.subject] >= gate.alpha - 1e-6 for gate in gates.values() for i, r in enumerate(rows)]
        assert len(opened) == 8
        assert on == "original" or all(opened)
        first = next(iter(gates.values()))  # nothing stands below it: both ways agree there
        assert all(first.scores[i, r.subject] >= first.alpha - 1e-6 for i, r in enumerate(rows))


def test_padding_and_batches_of_questions_change_nothing(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone = tiny()
    prompts = ["City A is in", "B", "Who lives in that far city of Bee, and who in City C?"]
    with build(scope=Scope(alpha=1.0, dynamic=False)).edit(backbone, requests) as edited:
        together = edited.score(prompts, ["Land 0"] * 3)
        alone = [edited.score([p], ["Land 0"])[0] for p in prompts]
        for a, b in zip(together, alone, strict=True):
            torch.testing.assert_close(a.log_probs, b.log_probs, rtol=1e-4, atol=1e-5)
        texts = edited.generate(prompts, max_new_tokens=6)
        assert texts == [edited.generate([p], max_new_tokens=6)[0] for p in prompts]


def test_state_is_saved_and_a_merge_is_refused(
    build: Callable[..., CoachHook], tiny: Callable[..., Backbone], requests: list[EditRequest], tmp_path: Path
) -> None:
    backbone, editor = tiny(), build()
    before = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    prompts, targets = [r.prompt for r in requests], [r.target for r in requests]
    with editor.edit(backbone, requests[:3]) as edited:
        edited.save(tmp_path / "edits")
        loaded = HookedEdited(editor, backbone).restored(tmp_path / "edits")
        assert loaded.alphas() == edited.alphas()
        with pytest.raises(ValueError, match=r"made by CoachHook, not by CoachHook with scope\.relative"):
            HookedEdited(build(scope=Scope(relative=True)), backbone).restored(tmp_path / "edits")
        with edited.edit(requests[3:]) as more, loaded.edit(requests[3:]) as same:
            for a, b in zip(more.score(prompts, targets), same.score(prompts, targets), strict=True):
                torch.testing.assert_close(a.log_probs, b.log_probs)
        assert not hasattr(edited, "merge")
        assert edited.weight_changes() == {}
        with pytest.raises(AttributeError, match="no weights can hold them"):
            edited.merge()  # type: ignore[operator]
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.model.modules())
    with pytest.raises(ValueError, match="must not stand in the last"), build(layers=[3]).edit(backbone, requests):
        pass
    with pytest.raises(ValueError, match="scope"):
        Scope(cover=0.0)
