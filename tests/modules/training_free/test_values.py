"""Value vectors: against a plain loop over whole passes, many at once against one by one, EAC, stops and clamps."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRequest
from datamodules.tokens import encode, encode_subject
from modules.backbone import Backbone
from modules.training_free import prepared, values
from modules.training_free.value_options import EAC, Place, ValueOptions
from modules.training_free.values import find_values

REQUESTS = [
    EditRequest("City A is in", "Land 0", "City A"),
    EditRequest("Who lives in the far city of Bee?", "me", "Bee"),
    EditRequest("Cee ", "Peru", "Cee "),  # the subject's last token itself predicts the target
]
PREFIXES = ["", "I think. ", "Because. "]
OPTIONS = ValueOptions(steps=6, lr=0.2, clamp=0.6, weight_decay=0.3, kl_factor=0.2)


@pytest.fixture
def exact(tiny: Callable[..., Backbone]) -> Callable[..., Backbone]:
    def make(kind: str = "llama") -> Backbone:
        backbone = tiny(kind)
        backbone.model.double()
        return backbone

    return make


def plainly(backbone: Backbone, request: EditRequest, layer: int, place: Place, options: ValueOptions) -> Tensor:
    """One edit, one row at a time, whole passes, torch's own Adam."""
    stem = f"{backbone.parts.layers}.{layer}"
    names = {
        "mlp": [f"{stem}.{backbone.parts.down}"],
        "layer": [stem],
        "attention and mlp": [f"{stem}.{backbone.parts.attention}", f"{stem}.{backbone.parts.down}"],
    }[place]
    delta = torch.zeros(len(names), backbone.hidden_size, dtype=torch.float64, requires_grad=True)
    initial: list[Tensor] = []

    def logits(ids: tuple[int, ...], at: int, added: bool) -> Tensor:
        handles = []
        for i, name in enumerate(names):

            def hook(_: Any, __: Any, out: Any, i: int = i) -> Any:
                value = out[0] if isinstance(out, tuple) else out
                if not added:
                    initial.append(value[0, at].detach())
                    return out
                value = value.clone()
                value[0, at] += delta[i]
                return (value, *out[1:]) if isinstance(out, tuple) else value

            handles.append(backbone.model.get_submodule(name).register_forward_hook(hook))
        found = backbone.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        for handle in handles:
            handle.remove()
        return found

    bare, at = encode_subject(backbone.tokenizer, request.prompt, str(request.subject))
    logits(bare.ids, at, False)
    norms = torch.stack(initial).norm(dim=-1)
    drift, drift_at = encode_subject(backbone.tokenizer, f"{request.subject} is a", str(request.subject))
    seen_at = -1 if options.kl_at == "phrase" else drift_at
    before = logits(drift.ids, drift_at, False)[seen_at].detach()
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    for step in range(options.steps):
        loss = torch.zeros((), dtype=torch.float64)
        for prefix in PREFIXES:
            row, at = encode_subject(backbone.tokenizer, request.prompt, str(request.subject), request.target, prefix)
            logp = logits(row.ids, at, True)
            start = encode(backbone.tokenizer, request.prompt, request.target, prefix).target_start
            loss = loss + F.nll_loss(logp[start - 1 : -1], torch.tensor(row.ids[start:])) / len(PREFIXES)
        after = logits(drift.ids, drift_at, True)[seen_at]
        loss = loss + options.kl_factor * F.kl_div(before, after, reduction="sum", log_target=True)
        power = 2 if options.decay == "released" else 1
        loss = loss + options.weight_decay * (delta.norm(dim=-1) / norms**power).sum()
        if loss.item() < options.stop or step == options.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            limit = options.clamp * norms[:, None]
            delta.mul_((limit / delta.norm(dim=-1, keepdim=True)).clamp(max=1))
    return delta.detach()


@pytest.mark.parametrize(
    ("kind", "layer", "place", "decay"),
    [
        ("llama", 1, "mlp", "released"),
        ("llama", 2, "layer", "relative"),
        ("llama", 3, "layer", "released"),  # the last layer: nothing runs above it
        ("llama", 0, "attention and mlp", "relative"),
        ("qwen3", 2, "attention and mlp", "released"),
        ("gpt2", 0, "mlp", "released"),
        ("gpt_neox", 1, "layer", "released"),
    ],
)
def test_a_batch_finds_what_whole_passes_find_one_by_one(
    exact: Callable[..., Backbone], kind: str, layer: int, place: Place, decay: Any
) -> None:
    backbone = exact(kind)
    options = replace(OPTIONS, decay=decay, chunk=5)  # rows of an edit fall into different passes
    found = find_values(backbone, REQUESTS, PREFIXES, layer, place, options)
    for e, request in enumerate(REQUESTS):
        expected = plainly(backbone, request, layer, place, options)
        if layer < 3 or request.prompt == request.subject:  # else nothing above carries the change to the target
            assert expected.norm() > 0.1
        torch.testing.assert_close(found.delta[e], expected, rtol=1e-5, atol=1e-6)


def test_drift_at_the_subject_as_released_code_reads_it(exact: Callable[..., Backbone]) -> None:
    backbone = exact("llama")
    options = replace(OPTIONS, kl_at="subject", kl_factor=2.0)
    found = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", options)
    for e, request in enumerate(REQUESTS):
        expected = plainly(backbone, request, 1, "layer", options)
        torch.testing.assert_close(found.delta[e], expected, rtol=1e-5, atol=1e-6)
        assert (expected - plainly(backbone, request, 1, "layer", replace(options, kl_at="phrase"))).norm() > 0.01


def test_gptj_whose_layers_return_tuples(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny("gptj")
    backbone.model.double()
    found = find_values(backbone, REQUESTS[:1], PREFIXES, 1, "layer", OPTIONS)
    expected = plainly(backbone, REQUESTS[0], 1, "layer", OPTIONS)
    torch.testing.assert_close(found.delta[0], expected, rtol=1e-3, atol=1e-3)  # its attention is in float32


@pytest.mark.parametrize("eac", [None, EAC(keep=0.25, first_steps=3, steps=4, l1=1e-6)])
def test_edits_that_stop_leave_the_batch_and_the_others_alone(exact: Callable[..., Backbone], eac: EAC | None) -> None:
    backbone = exact()
    options = replace(OPTIONS, steps=25, clamp=30.0, weight_decay=0.0, kl_factor=0.0, stop=6.0, eac=eac)
    together = find_values(backbone, REQUESTS, PREFIXES, 1, "mlp", options)
    alone = [find_values(backbone, [r], PREFIXES, 1, "mlp", options) for r in REQUESTS]
    for e, one in enumerate(alone):
        torch.testing.assert_close(together.delta[e], one.delta[0], rtol=1e-7, atol=1e-9)
        assert together.updates[e] == one.updates[0]
    if eac is None:
        assert len(set(together.updates.tolist())) > 1  # they stop at different steps
        assert ((together.loss < options.stop) == (together.updates < 24)).all()
    else:
        assert (together.delta != 0).sum(-1).max() <= 0.25 * backbone.hidden_size


@pytest.mark.parametrize("eac", [None, EAC(keep=0.5, first_steps=3, steps=4, l1=1e-6)])
@pytest.mark.parametrize("early", [False, True])
def test_a_gradient_that_no_step_takes_is_not_made(
    tiny: Callable[..., Backbone], eac: EAC | None, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither of the last step nor of one at which all have stopped; but stage 1 of EAC scores by all its gradients."""
    options = replace(OPTIONS, steps=9, clamp=30.0, weight_decay=0.0, kl_factor=0.0, stop=0.0, eac=eac)
    if early:
        fewer = replace(options, steps=5, eac=replace(eac, steps=2) if eac else None)
        reached = float(find_values(tiny(), REQUESTS[:1], PREFIXES, 1, "mlp", fewer).loss)
        options = replace(options, stop=reached + 1e-4)
    passes: list[int] = []
    gradient, losses = values._Search.gradient, prepared.Prepared.losses

    def counted(rows: prepared.Prepared, *given: Any) -> Tensor:
        total = losses(rows, *given)
        total.register_hook(lambda _: passes.append(1))
        return total

    def find() -> tuple[values.Values, int]:
        passes.clear()
        return find_values(tiny(), REQUESTS[:1], PREFIXES, 1, "mlp", options), len(passes)

    monkeypatch.setattr(prepared.Prepared, "losses", counted)
    found, count = find()
    monkeypatch.setattr(values._Search, "gradient", lambda search, *given: gradient(search, *given[:3]))
    expected, whole = find()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
    assert count == whole - 1
    assert found.updates.tolist() == [count - (3 if eac else 0)]
    assert whole == {(False, False): 9, (False, True): 5, (True, False): 7, (True, True): 5}[eac is not None, early]


def test_the_clamp_holds_and_is_reached(exact: Callable[..., Backbone]) -> None:
    found = find_values(exact(), REQUESTS, PREFIXES, 1, "mlp", replace(OPTIONS, clamp=0.1))
    share = found.delta.norm(dim=-1) / found.initial.norm(dim=-1)
    assert (share < 0.1 + 1e-9).all()
    assert share.max() > 0.1 - 1e-9


def test_anchors_of_every_coordinate_are_the_host_method(exact: Callable[..., Backbone]) -> None:
    backbone = exact()
    host = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", OPTIONS)
    every = EAC(keep=1.0, first_steps=3, steps=OPTIONS.steps, warm_start=False, l1=0.0)
    same = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", replace(OPTIONS, eac=every))
    torch.testing.assert_close(same.delta, host.delta)
    # stage 2 goes on from where stage 1 ended
    warm = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", replace(OPTIONS, eac=replace(every, warm_start=True)))
    assert (warm.loss < host.loss).all()
    # a strong net draws what is kept to 0
    net = replace(every, keep=0.5, l1=1e-2, l2=1.0)
    shrunk = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", replace(OPTIONS, eac=net))
    assert (shrunk.delta.norm(dim=-1) < 0.5 * host.delta.norm(dim=-1)).all()


def test_bf16_weights_find_float32_values(tiny: Callable[..., Backbone]) -> None:
    expected = find_values(tiny(), REQUESTS, PREFIXES, 1, "mlp", OPTIONS)
    backbone = tiny()
    backbone.model.bfloat16()
    found = find_values(backbone, REQUESTS, PREFIXES, 1, "mlp", OPTIONS)
    assert found.delta.dtype == torch.float32
    assert F.cosine_similarity(found.delta.flatten(), expected.delta.flatten(), dim=0) > 0.9


def test_works_in_inference_mode_and_while_layers_are_recomputed(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    expected = find_values(backbone, REQUESTS, PREFIXES, 1, "mlp", OPTIONS)
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    backbone.model.train()
    modes = [m.training for m in backbone.model.modules()]
    with torch.inference_mode():
        found = find_values(backbone, REQUESTS, PREFIXES, 1, "mlp", OPTIONS)
    torch.testing.assert_close(found.delta.clone(), expected.delta)
    assert [m.training for m in backbone.model.modules()] == modes
    assert not any("forward" in vars(layer) for layer in backbone.layers)


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"steps": 0}, {"clamp": 0.0}, {"kl_factor": -1.0}, {"chunk": 0}, {"kl_at": "end"}):
        with pytest.raises(ValueError, match="values"):
            ValueOptions(**wrong)
    with pytest.raises(ValueError, match="eac"):
        EAC(keep=0.0)
