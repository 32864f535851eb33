"""IBKE: its stages written out, its loss against torch.distributions, many edits at once against one by one."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import Backbone, BackboneConfig
from modules.editor import Edited
from modules.export import export, load_editor
from modules.gradients import Factors
from modules.hypernetwork.batch import EditBatch
from modules.hypernetwork.editor import DeltaEdited
from modules.interventions import linear
from modules.trained.ibke import IBKE, Bottleneck, IbkeConfig, IbkeLayers, IbkeLoss, IbkeNetwork

SMALL = IbkeConfig(latents=3, width=8, edit_lr=0.05)
PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]


def moved(module: nn.Module) -> None:
    """Away from the start, where the residual is zero."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "edit_lr" not in name:
                p += 0.2 * torch.randn(p.shape, generator=draw)


@pytest.fixture
def build(tiny_config: Callable[..., BackboneConfig], records: list[EditRecord]) -> Callable[..., IBKE]:
    def make(kind: str = "llama", config: IbkeConfig = SMALL, **options: Any) -> IBKE:
        module = IBKE(tiny_config(kind), IbkeLayers([1, 2]), config, **options)
        module.configure_model()
        module.calibrate(records)
        moved(module)
        return module

    return make


def batch_of(module: IBKE, records: Sequence[EditRecord], seed: int = 50) -> EditBatch:
    return module.collator()([Slot(r, i, seed + i) for i, r in enumerate(records)])


def gradients(module: IBKE, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- the hypernetwork


@pytest.mark.parametrize("scaled", [True, False])
def test_both_stages_as_the_paper_writes_them(scaled: bool) -> None:
    """Equations 26 to 32 with matrix products alone, edit by edit; the second is padded from token 2 on."""
    config = replace(SMALL, scaled_attention=scaled)
    net = Bottleneck(5, config).double()
    moved(net)
    s, noise = torch.randn(2, 4, 5).double(), torch.randn(2, 3, 8).double()
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    seen = net(s, mask, noise)

    def attend(part: Any, a: Tensor, b: Tensor) -> Tensor:
        q, k, v = (
            a @ part.query.weight.T + part.query.bias,
            *(b @ w.weight.T + w.bias for w in (part.key, part.value)),
        )
        return torch.softmax(q @ k.T / (8**0.5 if scaled else 1), dim=-1) @ v

    for b, length in enumerate((4, 2)):
        one = s[b, :length]
        mean, log_variance = attend(net.mean, net.latents, one), attend(net.log_variance, net.latents, one)
        log_variance = 4 * torch.tanh(log_variance / 4)
        z = mean + torch.exp(log_variance).sqrt() * noise[b]
        read = attend(net.read, one, z)
        scale = torch.sigmoid(read @ net.scale.weight.T + net.scale.bias)  # type: ignore[union-attr]
        changed = scale * (one + read @ net.residual.weight.T + net.residual.bias)
        torch.testing.assert_close(seen.mean[b], mean)
        torch.testing.assert_close(seen.log_variance[b], log_variance)  # type: ignore[index]
        torch.testing.assert_close(seen.scale[b, :length], scale[:, 0])
        torch.testing.assert_close(seen.transformed[b, :length], changed)


def test_information_is_the_divergence_from_a_standard_normal() -> None:
    net = Bottleneck(5, SMALL).double()
    moved(net)
    seen = net(torch.randn(2, 4, 5).double(), torch.ones(2, 4, dtype=torch.bool))
    assert seen.log_variance is not None
    latents = Normal(seen.mean, (seen.log_variance / 2).exp())
    expected = kl_divergence(latents, Normal(torch.zeros_like(seen.mean), torch.ones_like(seen.mean)))
    torch.testing.assert_close(seen.information(), expected)
    assert seen.information().min() > 0


def factors_of(shapes: dict[str, tuple[int, int]], lengths: Sequence[int]) -> dict[str, Factors]:
    longest = max(lengths)
    mask = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    draw = torch.Generator().manual_seed(1)
    return {
        name: Factors(*(torch.randn(len(lengths), longest, d, generator=draw) * mask[..., None] for d in size), mask)
        for name, size in shapes.items()
    }


SHAPES = {"0.down": (6, 4), "1.down": (6, 4)}


def test_at_the_start_it_is_scaled_gradient_descent_and_can_learn() -> None:
    config = replace(SMALL, normalise=False, edit_lr=0.1)
    factors = factors_of(SHAPES, (4, 2))
    for scale in (True, False):
        net = IbkeNetwork(SHAPES, replace(config, token_scale=scale))
        deltas, _ = net(factors)
        (seen, mask) = net.look(factors)["0.down"]
        f = factors["0.down"]
        by_token = (seen.scale**2 * mask)[..., None]  # both factors are scaled
        torch.testing.assert_close(deltas["0.down"].term(2).weight(), -0.1 * (f.h * by_token).transpose(1, 2) @ f.u)
        assert bool((seen.scale == 1).all()) is not scale
        sum(d.term(2).weight().square().sum() for d in deltas.values()).backward()  # type: ignore[union-attr]
        assert all(net.bottlenecks[k].residual.weight.grad.abs().max() > 0 for k in net.bottlenecks)  # type: ignore[union-attr]


def test_what_is_drawn_is_of_each_edits_seed_and_only_in_training() -> None:
    net = IbkeNetwork(SHAPES, replace(SMALL, normalise=False))
    moved(net)
    factors = factors_of(SHAPES, (4, 2))
    weights = lambda seeds: net(factors, seeds)[0]["1.down"].term(2).weight()  # noqa: E731
    drawn = weights(torch.tensor([7, 8]))
    assert torch.equal(drawn, weights(torch.tensor([7, 8])))
    other = weights(torch.tensor([7, 9]))
    torch.testing.assert_close(other[0], drawn[0])
    assert not torch.allclose(other[1], drawn[1])
    assert torch.equal(weights(None), weights(None))
    assert not torch.allclose(weights(None)[0], drawn[0])
    # over many draws, standard normal numbers, other ones for each matrix
    noise = net._noise(torch.arange(300))
    assert noise["0.down"].shape == (300, 3, 8)
    assert noise["0.down"].mean().abs() < 0.05
    assert abs(float(noise["0.down"].std()) - 1) < 0.05
    assert not torch.equal(noise["0.down"], noise["1.down"])


def test_switches() -> None:
    factors = factors_of(SHAPES, (4, 2))
    without = IbkeNetwork(SHAPES, replace(SMALL, bottleneck=False))
    assert not any("log_variance" in n for n in without.state_dict())
    deltas, penalties = without(factors, torch.tensor([7, 8]))
    assert penalties == {}
    assert torch.equal(deltas["0.down"].a, without(factors)[0]["0.down"].a)  # nothing is drawn
    assert not any(".scale." in n for n in IbkeNetwork(SHAPES, replace(SMALL, token_scale=False)).state_dict())
    _, penalties = IbkeNetwork(SHAPES, replace(SMALL, beta=0.0))(factors)
    assert penalties["information"].tolist() == [0, 0]


def test_an_edit_without_a_token_makes_nothing() -> None:
    net = IbkeNetwork(SHAPES, SMALL)
    deltas, penalties = net(factors_of(SHAPES, (4, 0)), torch.tensor([1, 2]))
    assert deltas["0.down"].edit.tolist() == [0, 0, 0, 0]
    assert penalties["information"].isfinite().all()
    (penalties["information"].sum() + deltas["0.down"].a.sum()).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters() if p.grad is not None)


# ---------------------------------------------------------------------- training


def plain_losses(module: IBKE, records: list[EditRecord], batch: EditBatch) -> dict[str, Tensor]:
    """Equations 34 to 36, one edit at a time, with written weights and whole logits."""
    backbone, network = module.deltas.backbone, module.deltas.network
    generality, locality, information = [], [], []
    for i in range(len(records)):
        one = module.collator()([Slot(records[i], 0, 50 + i)])
        factors, _ = module._factors(one)
        deltas, penalties = network(factors, one.edit_seed)
        information.append(penalties["information"][0] / module.ibke.beta if penalties else torch.zeros(()).double())
        weights = {}
        for name, d in deltas.items():
            layer = linear(backbone.model, name)
            change = d.a.T @ d.b
            conv = type(layer).__name__ == "Conv1D"
            weights[f"{name}.weight"] = layer.weight + (change if conv else change.T)  # type: ignore[operator]
        for b in (batch.query_pool == i).nonzero()[:, 0].tolist():
            length = int(batch.queries_mask[b].sum())
            ids, answer = batch.queries[b, :length], batch.queries_answer[b, :length]
            given = {"input_ids": ids[None], "use_cache": False}
            edited = torch.func.functional_call(backbone.model, weights, (), given).logits[0, :-1].log_softmax(-1)
            at = answer[1:]
            if batch.in_scope[b]:
                generality.append(-edited[at].gather(1, ids[1:][at][:, None]).mean())
            else:
                original = backbone.model(**given).logits[0, :-1].log_softmax(-1)
                locality.append((edited[at].exp() * (edited[at] - original[at])).sum(-1).mean())
    parts = {"edit": torch.stack(generality).mean(), "locality": torch.stack(locality).mean()}
    if module.ibke.bottleneck:
        parts["information"] = module.ibke.beta * torch.stack(information).mean()
    return {"loss": sum(parts.values()), **parts}  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_edits_in_parallel_are_edits_one_by_one_with_written_weights(
    build: Callable[..., IBKE], records: list[EditRecord], kind: str, bottleneck: bool
) -> None:
    """Losses, and gradients of everything that is trained, in double precision."""
    module = build(kind, replace(SMALL, bottleneck=bottleneck))
    module.double()
    module.deltas.backbone.model.double()
    batch = batch_of(module, records)
    expected, found = plain_losses(module, records, batch), module.losses(batch, training=True)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    wanted, got = gradients(module, expected["loss"]), gradients(module, found["loss"])
    assert wanted.keys() == got.keys() == {n for n, _ in module.named_parameters()}
    for name, gradient in wanted.items():
        if "key.bias" not in name:  # the same for all scores, so softmax takes it out
            assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_splitting_a_batch_changes_nothing(build: Callable[..., IBKE], records: list[EditRecord]) -> None:
    """What is drawn belongs to the edits, so it goes with them."""
    module = build()
    whole = module.losses(batch_of(module, records), training=True)
    halves = [module.losses(batch_of(module, records[at : at + 2], 50 + at), training=True) for at in (0, 2)]
    for name, value in whole.items():
        torch.testing.assert_close((halves[0][name] + halves[1][name]) / 2, value)


def test_a_record_counts_once_however_many_edits_it_has(build: Callable[..., IBKE], records: list[EditRecord]) -> None:
    module = build()
    two = replace(records[0], requests=(records[0].request, records[1].request))
    batch = batch_of(module, [two, *records[2:]])
    factors, _ = module._factors(batch)
    _, penalties = module.deltas.network(factors)
    a, b, *others = penalties["information"]
    expected = ((a + b) / 2 + sum(others)) / len(batch)
    torch.testing.assert_close(module.losses(batch)["information"], expected)


def test_one_batch_is_overfitted(build: Callable[..., IBKE], records: list[EditRecord]) -> None:
    module = build(config=replace(SMALL, width=16, edit_lr=0.02), loss=IbkeLoss(1.0, 0.1))
    batch = batch_of(module, records)
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = module.losses(batch, training=True)["edit"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_bf16_backbone_trains_an_fp32_hypernetwork(build: Callable[..., IBKE], records: list[EditRecord]) -> None:
    exact, module = (build(config=replace(SMALL, edit_lr=1e-3)) for _ in range(2))
    module.deltas.backbone.model.bfloat16()
    batch = batch_of(module, records)
    parts, wanted = module.losses(batch), exact.losses(batch)
    torch.testing.assert_close(parts["edit"].float(), wanted["edit"], rtol=0.02, atol=0.02)
    found, expected = gradients(module, parts["loss"]), gradients(exact, wanted["loss"])
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    together = [torch.cat([g[name].flatten() for name in expected]) for g in (found, expected)]
    assert F.cosine_similarity(*together, dim=0) > 0.95


# ---------------------------------------------------------------------- editing


def scores(edited: Edited) -> Tensor:
    return torch.cat([s.log_probs for s in edited.score(PROMPTS, TARGETS)])


def test_as_an_editor_it_is_the_same_each_time_and_can_be_merged(
    build: Callable[..., IBKE], records: list[EditRecord]
) -> None:
    module = build("gpt2")
    module.train()
    backbone, requests = module.deltas.backbone, [r.request for r in records]
    assert module.deltas.names == ["transformer.h.1.mlp.c_proj", "transformer.h.2.mlp.c_proj"]
    before = copy.deepcopy(backbone.model.state_dict())
    with module.editor().edit(backbone, requests[:2]) as edited, edited.edit(requests[2:]) as further:
        assert isinstance(edited, DeltaEdited)
        with module.editor().edit(backbone, requests[:2]) as again:
            assert torch.equal(scores(again), scores(edited))
        assert not torch.allclose(scores(edited), scores(Edited(backbone)), atol=1e-3)
        assert not torch.allclose(scores(further), scores(edited), atol=1e-3)
        merged = Edited(Backbone(further.merge(), backbone.tokenizer, backbone.config))
        torch.testing.assert_close(scores(merged), scores(further), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(t, before[n]) for n, t in backbone.model.state_dict().items())


def test_export_and_back(build: Callable[..., IBKE], records: list[EditRecord], tmp_path: Path) -> None:
    module = build("qwen3")
    requests = [r.request for r in records]
    with module.editor().edit(module.deltas.backbone, requests) as edited:
        expected = scores(edited)
    export(module, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"editor.json", "editor.safetensors"}
    editor = load_editor(tmp_path / "out")
    assert editor.name == "ibke"
    with editor.edit(editor.reader, requests) as edited:
        assert torch.equal(scores(edited), expected)


def test_wrong_settings_are_named() -> None:
    for wrong in ({"latents": 0}, {"width": 0}, {"beta": -1.0}, {"log_variance_bound": 0.0}):
        with pytest.raises(ValueError, match=rf"model\.ibke\.latents and width.*{next(iter(wrong.values()))}"):
            IbkeConfig(**wrong)
