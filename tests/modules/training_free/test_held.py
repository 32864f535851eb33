"""Passes over the same prompts that begin where the last ones still hold: the same edits, from fewer layers run."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.delta_edited import DeltaEdited
from modules.training_free import MEMIT, PMET, CoachHook
from modules.training_free.held import Held
from modules.training_free.second_moments import Moments
from modules.training_free.subject import row, subject_states
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions


def counting(backbone: Backbone) -> list[int]:
    """How often each layer is run from now on; the list grows by the layer's number."""
    ran: list[int] = []
    for i in range(len(backbone.layers)):
        backbone.attention(i).register_forward_hook(lambda *_, i=i: ran.append(i))
    return ran


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("editor", [MEMIT, PMET, CoachHook])
def test_edits_are_the_same_bit_for_bit(
    tiny: Callable[..., Backbone],
    records: list[EditRecord],
    kind: str,
    editor: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of hook layers on top of earlier ones, and where a layer between two edited ones is not edited."""
    moments = Moments(tokens=400, length=40, folder=str(tmp_path))
    contexts, values = Contexts(counts={8: 2}), ValueOptions(steps=4, lr=0.2)
    method = editor([0, 2] if editor is CoachHook else [0, 1, 2], contexts=contexts, values=values, moments=moments)
    requests = [record.request for record in records]

    def edited() -> DeltaEdited:
        with method.edit(tiny(kind), requests[:2]) as first, first.edit(requests[2:]) as found:
            return found

    now = edited()
    monkeypatch.setattr(Held, "reading", lambda *_: nullcontext())
    expected = edited()
    assert len(now.deltas) == len(method.layers)
    for name, deltas in expected.deltas.items():
        assert bool(deltas.b.any())
        assert all(torch.equal(a, b) for a, b in zip(deltas, now.deltas[name], strict=True))


def test_layers_below_are_run_once(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone = tiny()
    rows = [row(backbone, r.request.prompt, str(r.request.subject)) for r in records]
    names = [f"model.layers.{i}.mlp.down_proj" for i in range(4)]
    whole = [subject_states(backbone, rows, [name], [], chunk=2)[name] for name in names]
    ran, held = counting(backbone), Held()
    for layer, layers in ((1, [0, 1]), (2, [1, 2]), (3, [2, 3])):  # in each of two passes
        held.layer = layer
        found = subject_states(backbone, rows, [names[layer]], [], chunk=2, held=held)[names[layer]]
        assert torch.equal(found, whole[layer])
        assert ran == layers * 2
        ran.clear()


def test_what_is_held_is_bounded(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone = tiny()
    rows = [row(backbone, r.request.prompt, str(r.request.subject)) for r in records]
    tokens, name = len(rows[0].ids), "model.layers.2.mlp.down_proj"
    one = 4 * 2 * tokens * backbone.hidden_size  # bytes of a pass of two rows
    whole = subject_states(backbone, rows, [name], [], chunk=2)[name]
    ran, held = counting(backbone), Held(2, room=2 * one - 1)
    for again in ([0, 1, 2, 0, 1, 2], [2, 0, 1, 2]):
        assert torch.equal(subject_states(backbone, rows, [name], [], chunk=2, held=held)[name], whole)
        assert ran == again
        assert sum(entering.hidden.nbytes for _, entering in held.found.values()) == one
        ran.clear()
