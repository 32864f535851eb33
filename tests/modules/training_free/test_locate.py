"""ROME, R-ROME, MEMIT, PMET, EMMET, AlphaEdit: what they write, that they leave no trace, and their state."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.delta_edited import DeltaEdited
from modules.editor import Edited
from modules.interventions import Deltas, linear
from modules.training_free import EMMET, MEMIT, PMET, ROME, RROME, AlphaEdit
from modules.training_free.closed_form import automatic_weight
from modules.training_free.locate import LocateEditor
from modules.training_free.second_moments import Moments, second_moments
from modules.training_free.subject import row, subject_states
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions
from modules.training_free.values import find_values

CONTEXTS = Contexts(counts={8: 2})
VALUES = ValueOptions(steps=8, lr=0.2)
EDITORS: dict[str, Callable[..., LocateEditor]] = {
    "rome": ROME,
    "r_rome": RROME,
    "memit": MEMIT,
    "pmet": PMET,
    "emmet": EMMET,
    "alphaedit": lambda **kw: AlphaEdit(threshold=0.8, relative=True, l2=0.1, **kw),
}
OF_SEVERAL_LAYERS = ("memit", "pmet", "alphaedit")


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., LocateEditor]:
    def make(name: str, **options: Any) -> LocateEditor:
        at = {"layers": [0.25, 0.5]} if name in OF_SEVERAL_LAYERS else {"layer": 1}
        given = {
            "moments": Moments(tokens=400, length=40, folder=str(tmp_path)),
            "contexts": CONTEXTS,
            "values": VALUES,
        }
        return EDITORS[name](**(at | given | options))

    return make


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [r.request for r in records]


def log_probs(edited: Edited, requests: list[EditRequest]) -> Tensor:
    scores = edited.score([r.prompt for r in requests], [r.target for r in requests])
    return torch.stack([s.log_probs.mean() for s in scores])


def weights(backbone: Backbone) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in backbone.model.state_dict().items()}


def hooks(backbone: Backbone) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in backbone.model.modules())


def change(edited: DeltaEdited, name: str) -> Tensor:
    """Of the weight, [d_in, d_out]."""
    return edited.terms[name].weight()[0]


# ---------------------------------------------------------------------- what every one of them keeps to


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", EDITORS)
def test_an_editor_edits_and_leaves_no_trace(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest], name: str, kind: str
) -> None:
    backbone, editor = tiny(kind), build(name)
    assert editor.name == name
    before, was, drawn = weights(backbone), log_probs(Edited(backbone), requests), torch.get_rng_state()
    with editor.edit(backbone, requests) as edited:
        after = log_probs(edited, requests)
        merged = edited.merge()
        assert edited.generate(["City A is in"], max_new_tokens=3)
        assert hooks(backbone) == 0
        assert edited.weight_changes().keys() == set(editor.names(backbone))
    assert after.mean() > was.mean()
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())
    torch.testing.assert_close(log_probs(Edited(backbone), requests), was, rtol=0, atol=0)
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {f"{n}.weight" for n in editor.names(backbone)}
    plain = Edited(Backbone(merged, backbone.tokenizer, backbone.config))
    torch.testing.assert_close(log_probs(plain, requests), after, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_further_edits_within_inference_mode(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest], name: str
) -> None:
    """As Lightning validates: the gradient of a further edit goes through the first ones."""
    backbone = tiny()
    with build(name).edit(backbone, requests[:1]) as edited, edited.edit(requests[1:]) as further:
        expected = log_probs(further, requests)
    with torch.inference_mode(), build(name).edit(backbone, requests[:1]) as edited, edited.edit(requests[1:]) as more:
        torch.testing.assert_close(log_probs(more, requests), expected)


@pytest.mark.parametrize("name", ["rome", "memit"])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_failure_leaves_no_trace(
    build: Callable[..., LocateEditor],
    tiny: Callable[..., Backbone],
    requests: list[EditRequest],
    name: str,
    share: float,
) -> None:
    """At the first, a middle, and the last pass through a layer in the middle."""
    backbone, editor = tiny(), build(name)
    before, drawn = weights(backbone), torch.get_rng_state()
    passes = [0]
    fail_at: list[int] = []

    def counting(*_: Any) -> None:
        passes[0] += 1
        if passes[0] in fail_at:
            raise RuntimeError("out of memory")

    with editor.edit(backbone, requests):  # contexts and second moments are there from now on
        pass
    handle = backbone.layers[2].register_forward_pre_hook(counting)
    with editor.edit(backbone, requests):
        pass
    fail_at.append(1 + int(share * passes[0]))
    passes[0] = 0
    with pytest.raises(RuntimeError, match="out of memory"), build(name).edit(backbone, requests):
        pass
    handle.remove()
    assert fail_at[0] == passes[0]
    assert hooks(backbone) == 0
    assert not any("forward" in vars(m) for m in backbone.model.modules())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


@pytest.mark.parametrize("name", ["r_rome", "memit", "alphaedit"])
def test_state_is_saved_removed_and_added_to(
    build: Callable[..., LocateEditor],
    tiny: Callable[..., Backbone],
    requests: list[EditRequest],
    tmp_path: Path,
    name: str,
) -> None:
    backbone, editor = tiny(), build(name)
    with editor.edit(backbone, requests[:2]) as first, first.edit(requests) as both:
        assert both.requests == tuple(requests)  # the first two are not made again
        with editor.edit(backbone, requests) as at_once:
            differs = {n: (change(both, n) - change(at_once, n)).abs().max() for n in both.terms}
        # one by one as ever for R-ROME; the others make a batch together
        assert (max(differs.values()) < 1e-4) == (name == "r_rome")
        both.save(tmp_path / "edits")
        empty = type(both)(editor, backbone)
        loaded = empty.restored(tmp_path / "edits")
        assert loaded.requests == both.requests
        torch.testing.assert_close(log_probs(loaded, requests), log_probs(both, requests))
        with loaded.edit([replace(requests[0], target="Chile")]) as more, both.edit([more.requests[-1]]) as same:
            torch.testing.assert_close(log_probs(more, requests), log_probs(same, requests))  # memory is saved too
        less = both.remove(requests[1:3])
        assert less.requests == (requests[0], requests[3])
        for n, d in less.deltas.items():
            torch.testing.assert_close(d.a, both.deltas[n].a[[0, 3]])
        assert {n: len(m) for n, m in less.memory.items()} == dict.fromkeys(both.memory, 2)
        with pytest.raises(ValueError, match="not among the edits"):
            less.remove(requests[1:2])
        for n, t in less.remove(less.requests).terms.items():
            assert t.weight().abs().max() == 0, n
    other = build(name, **({"layers": [2]} if name in OF_SEVERAL_LAYERS else {"layer": 2}))
    with other.edit(backbone, []) as elsewhere, pytest.raises(ValueError, match="are of other layers"):
        elsewhere.restored(tmp_path / "edits")


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize(
    ("request_", "match"),
    [
        (EditRequest(text="City A is in Peru."), "edits a prompt with a target; this edit is free text"),
        (EditRequest("City A is in", "Peru"), 'needs the subject of every edit.*or add "subject": "..." to the edit$'),
        (EditRequest("City A is in", "Peru", "City B"), "has the subject 'City B'"),
    ],
)
def test_what_cannot_be_edited_is_refused_before_any_work(
    build: Callable[..., LocateEditor],
    tiny: Callable[..., Backbone],
    requests: list[EditRequest],
    name: str,
    request_: EditRequest,
    match: str,
) -> None:
    backbone = tiny()
    with monkeypatched_model(backbone) as calls:
        editor = build(name)
        with pytest.raises(ValueError, match=f"^{name} .*{match}"), editor.edit(backbone, [requests[0], request_]):
            pass
        with editor.edit(backbone, []) as edited, pytest.raises(ValueError, match=match), edited.edit([request_]):
            pass
    assert calls == []


class monkeypatched_model:
    """Notes every pass of a model."""

    def __init__(self, backbone: Backbone) -> None:
        self.model: Any = backbone.model.base_model

    def __enter__(self) -> list[int]:
        calls: list[int] = []
        self.handle = self.model.register_forward_pre_hook(lambda *_: calls.append(1))
        return calls

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def test_dropout_is_off_while_edits_are_made(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone, training = tiny("gpt2"), tiny("gpt2")
    training.model.train()
    with build("memit").edit(backbone, requests) as expected, build("memit").edit(training, requests) as found:
        for name, d in found.deltas.items():
            torch.testing.assert_close(d.b, expected.deltas[name].b)
    assert all(m.training for m in training.model.modules())


# ---------------------------------------------------------------------- what each of them is


def test_rome_gives_the_key_its_value(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """As released, the bare prompt's; as averaged, the mean key's: v0 + delta."""
    backbone = tiny()
    name = "model.layers.1.mlp.down_proj"
    layer: Any = linear(backbone.model, name)
    request = requests[0]
    prefixes = CONTEXTS.draw(backbone)
    values = find_values(backbone, [request], prefixes, 1, "mlp", VALUES)
    wanted = (values.initial + values.delta)[0, 0]
    rows = [row(backbone, request.prompt, str(request.subject), prefix=p) for p in prefixes]
    keys = subject_states(backbone, rows, [name], [])[name]
    assert len(rows) == 3
    for editor, key in (
        (build("rome"), keys[0]),
        (build("r_rome"), keys.mean(0)),
        (build("r_rome", keys="prompt"), keys[0]),
        (build("rome", moments=None), keys[0]),
    ):
        with editor.edit(backbone, [request]) as edited:
            torch.testing.assert_close(layer(key) + key @ change(edited, name), wanted, rtol=1e-4, atol=1e-4)
            matrix = change(edited, name)
            assert torch.linalg.matrix_rank(matrix, rtol=1e-4) == 1


def test_a_batch_of_rome_knows_what_it_changed_at_its_keys(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone = tiny()
    name = "model.layers.1.mlp.down_proj"
    bare = [row(backbone, r.prompt, str(r.subject)) for r in requests]
    with build("rome", batch=4).edit(backbone, requests) as edited:
        values = find_values(backbone, requests, CONTEXTS.draw(backbone), 1, "mlp", VALUES)
        with edited.applied():
            now = subject_states(backbone, bare, [], [name])[name]
        torch.testing.assert_close(now[-1], (values.initial + values.delta)[-1, 0], rtol=1e-4, atol=1e-4)
    with (
        build("rome", batch=1).edit(backbone, requests[:1]) as one,
        build("rome", batch=4).edit(backbone, requests[:1]) as same,
    ):
        torch.testing.assert_close(change(one, name), change(same, name))


def test_one_edit_of_emmet_is_rome(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """The same key throughout, its value found at the layer's output, whose change is the same."""
    backbone = tiny()
    name = "model.layers.1.mlp.down_proj"
    free = replace(VALUES, clamp=100.0, weight_decay=0.0)  # norms of the two outputs differ, nothing else
    with (
        build("r_rome", keys="prompt", values=free, contexts=Contexts(counts={})).edit(backbone, requests[:1]) as rome,
        build("emmet", values=free, contexts=Contexts(counts={})).edit(backbone, requests[:1]) as emmet,
        build("emmet", values=free, contexts=Contexts(counts={}), alpha_for_one=True).edit(
            backbone, requests[:1]
        ) as eased,
        build("memit", layers=[1], weight=1e-6, values=free, contexts=Contexts(counts={})).edit(
            backbone, requests[:1]
        ) as memit,
        build("memit", layers=[1], weight=1e12, values=free, contexts=Contexts(counts={})).edit(
            backbone, requests[:1]
        ) as nothing,
    ):
        expected = change(rome, name)
        torch.testing.assert_close(change(emmet, name), expected, rtol=1e-4, atol=1e-5)
        # one layer, one edit: MEMIT approaches ROME as the weight goes to 0, and nothing as it goes to infinity
        torch.testing.assert_close(change(memit, name), expected, rtol=1e-4, atol=1e-5)
        assert change(nothing, name).abs().max() < 1e-8 * expected.abs().max()
        assert change(eased, name).norm() < 0.999 * expected.norm()


def test_memit_against_numpy(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """Its first layer, by the paper's equation 14 on keys and residuals taken here row by row."""
    backbone, editor = tiny(), build("memit", weight=7.0)
    names = editor.names(backbone)
    assert names == ["model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"]
    prefixes = CONTEXTS.draw(backbone)
    values = find_values(backbone, requests, prefixes, 2, "layer", VALUES)
    keys = []
    for r in requests:
        each = [
            subject_states(backbone, [row(backbone, r.prompt, str(r.subject), prefix=p)], names[:1], [])[names[0]]
            for p in prefixes
        ]
        keys.append(torch.cat(each).mean(0))
    k = torch.stack(keys).double().numpy().T
    r = values.delta[:, 0].double().numpy().T / 2  # two layers left
    c = second_moments(backbone, names, editor.metrics.moments)[names[0]].double().numpy()  # type: ignore[attr-defined]
    expected = r @ k.T @ np.linalg.inv(7.0 * c + k @ k.T)
    with editor.edit(backbone, requests) as edited:
        np.testing.assert_allclose(change(edited, names[0]).numpy().T, expected, rtol=1e-3, atol=1e-5)
        d = edited.deltas[names[0]]
        assert isinstance(d, Deltas)
        assert d.a.shape == (4, 48)  # low rank: one row an edit


def test_a_weight_of_no_unit(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    given = build("memit", weight=automatic_weight(48))
    with build("memit", weight="auto").edit(tiny(), requests) as auto, given.edit(tiny(), requests) as same:
        for n in auto.terms:
            torch.testing.assert_close(change(auto, n), change(same, n))
    with pytest.raises(ValueError, match="weight must not be negative"):
        MEMIT(weight=-1.0)


def test_the_bare_prompt_has_half_of_memits_keys(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    backbone, editor = tiny(), MEMIT(layers=[1])
    rows = editor.rows(backbone, requests[:1])
    assert len(rows) == 6
    name = editor.names(backbone)[0]
    every = subject_states(backbone, rows, [name], [])[name]
    mean, bare = editor.keys(backbone, rows, 1, name)
    torch.testing.assert_close(bare[0], every[0])
    torch.testing.assert_close(mean[0], 0.5 * every[0] + 0.5 * every[1:].mean(0))
    torch.testing.assert_close(Contexts().weights(21), torch.full((21,), 1 / 21))


def test_alphaedit_keeps_ordinary_inputs_and_earlier_edits(
    build: Callable[..., LocateEditor], tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone, editor = tiny(), build("alphaedit")
    settings: Any = editor.threshold, editor.relative  # type: ignore[attr-defined]
    with editor.edit(backbone, requests[:2]) as first, first.edit(requests[2:]) as both:
        assert {n: tuple(m.shape) for n, m in both.memory.items()} == dict.fromkeys(editor.names(backbone), (4, 48))
        for name in editor.names(backbone):
            (metric,) = editor.metrics.projection(backbone, [name], *settings)  # type: ignore[attr-defined]
            assert 0 < editor.metrics.ranks[name] < 48  # type: ignore[attr-defined]
            torch.testing.assert_close(
                metric.basis.T.float() @ change(both, name), torch.zeros(metric.basis.shape[1], 32), atol=1e-4, rtol=0
            )
