"""MEND: its arithmetic on a case worked by hand, many edits at once against one by one."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig, load_backbone
from modules.editor import Edited
from modules.gradients import Factors
from modules.hypernetwork.batch import EditBatch, EditQueries
from modules.hypernetwork.module import EditedLayers, EditLoss, HyperOptimizer
from modules.hypernetwork.pooled import Pooled
from modules.interventions import LowRank, linear
from modules.trained.mend import MEND, MendConfig, MendNetwork

PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]


def batch_of(module: MEND, records: Sequence[EditRecord], pools: Sequence[int] | None = None) -> EditBatch:
    pools = pools or range(len(records))
    return module.collator()([Slot(r, p, 50 + i) for i, (r, p) in enumerate(zip(records, pools, strict=True))])


def gradients(module: MEND, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------------- the hypernetwork


def test_a_case_worked_by_hand() -> None:
    """One layer of d_in 2, d_out 1; two tokens of one edit, normalised, through one residual layer of rank 1."""
    network = MendNetwork({"w": (2, 1)}, MendConfig(rank=1, hidden_layers=0, edit_lr=0.5))
    network._statistics("w").observe(torch.tensor([[0.0, 0.0, 0.0], [2.0, 4.0, 6.0]]))
    network.commit()  # mean (1, 2, 3), deviation sqrt(2) (1, 2, 3)
    layer: Any = network.layers["2x1"][0]  # type: ignore[index]
    with torch.no_grad():
        layer.down.copy_(torch.tensor([[1.0, 0.0, 0.0]]))  # V x: the first feature
        layer.up.copy_(torch.tensor([[1.0], [-1.0], [2.0]]))
        layer.bias.copy_(torch.tensor([0.0, 0.0, 1.0]))
        layer.scale.copy_(torch.tensor([[2.0, 1.0, 1.0]]))
        layer.shift.copy_(torch.tensor([[0.0, 0.5, 0.0]]))
    r = 2**0.5
    # tokens with features (1 + r, 2, 3) and (1 - r, 2 + 2 r, 3 + 3 r), which are (1, 0, 0) and (-1, 1, 1) normalised
    h = torch.tensor([[[1 + r, 2.0], [1 - r, 2 + 2 * r], [9.0, 9.0]]])
    u = torch.tensor([[[3.0], [3 + 3 * r], [9.0]]])
    mask = torch.tensor([[True, True, False]])
    deltas, penalties = network({"w": Factors(h, u, mask)})
    # first:  1 + max(0, 2 * 1), 0 + max(0, -1 + 0.5), 0 + max(0, 2 + 1)        = 3, 0, 3
    # second: -1 + max(0, -2),   1 + max(0, 1 + 0.5),  1 + max(0, -2 + 1)       = -1, 2.5, 1
    torch.testing.assert_close(deltas["w"].a, torch.tensor([[3.0, 0.0], [-1.0, 2.5]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(deltas["w"].b, -0.5 * torch.tensor([[3.0], [1.0]]), rtol=1e-5, atol=1e-5)
    weight = deltas["w"].term(1).weight()[0]
    torch.testing.assert_close(weight, -0.5 * torch.tensor([[8.0], [2.5]]), rtol=1e-5, atol=1e-5)
    assert penalties == {}


def test_at_the_start_it_is_gradient_descent_on_normalised_factors_and_can_learn() -> None:
    network = MendNetwork({"w": (3, 2)}, MendConfig(rank=4, normalise=False, edit_lr=0.1))
    h, u = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    deltas, _ = network({"w": Factors(h, u, torch.ones(2, 5, dtype=torch.bool))})
    torch.testing.assert_close(deltas["w"].term(2).weight(), -0.1 * h.transpose(1, 2) @ u)
    deltas["w"].term(2).weight().square().sum().backward()
    assert all(layer.up.grad.abs().max() > 0 for layer in network.layers["3x2"])  # type: ignore[union-attr]


def test_shared_and_own_networks() -> None:
    shapes = {"0.up": (4, 6), "1.up": (4, 6), "0.down": (6, 4)}
    shared, own = (MendNetwork(shapes, MendConfig(rank=3, shared=s)) for s in (True, False))
    assert set(shared.layers) == set(shared.statistics) == {"4x6", "6x4"}
    assert shared.layers["4x6"][0].scale.shape == (2, 10)  # type: ignore[index, union-attr]
    assert shared.mode == {"0.up": 0, "1.up": 1, "0.down": 0}
    assert set(own.layers) == set(own.statistics) == {"0_up", "1_up", "0_down"}
    assert own.layers["0_up"][0].scale is None  # type: ignore[index, union-attr]
    # the two layers of a shape differ by scale and shift alone
    factors = Factors(torch.randn(1, 3, 4), torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    down = Factors(torch.randn(1, 3, 6), torch.randn(1, 3, 4), torch.ones(1, 3, dtype=torch.bool))
    given = {"0.up": factors, "1.up": factors, "0.down": down}
    assert torch.equal(shared(given)[0]["0.up"].a, shared(given)[0]["1.up"].a)
    with torch.no_grad():
        shared.layers["4x6"][1].shift[1] += 1.0  # type: ignore[index, union-attr, operator]
    assert not torch.equal(shared(given)[0]["0.up"].a, shared(given)[0]["1.up"].a)
    assert len(shared.edit_lr) == 3


def test_statistics_are_of_all_tokens_with_a_gradient(
    build_mend: Callable[..., MEND], records: list[EditRecord]
) -> None:
    module = build_mend(moved=False)
    network = module.deltas.network
    factors, _ = module._factors(batch_of(module, records))
    for key, names in {"32x48": ("gate_proj", "up_proj"), "48x32": ("down_proj",)}.items():
        tokens = torch.cat([f.tokens()[0] for n, f in factors.items() if n.endswith(names)]).double().numpy()
        statistics: Any = network.statistics[key]
        assert statistics.count == len(tokens) > 50
        np.testing.assert_allclose(statistics.mean, tokens.mean(0), rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(statistics.std, tokens.std(0, ddof=1), rtol=1e-5)


# ---------------------------------------------------------------------- training


def plain_losses(module: MEND, records: list[EditRecord], batch: EditBatch) -> dict[str, Tensor]:
    """One edit at a time: autograd's weight gradients checked elsewhere, here written weights and whole logits."""
    config, backbone = module.loss, module.deltas.backbone
    edit_losses, kls = [], []
    for i in range(len(records)):
        one = module.collator()([Slot(records[i], 0, 50 + i)])
        factors, _ = module._factors(one)
        deltas, _ = module.deltas.network(factors)
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
            logp = torch.func.functional_call(backbone.model, weights, (), given).logits[0, :-1].log_softmax(-1)
            if batch.in_scope[b]:
                edit_losses.append(F.nll_loss(logp[answer[1:]], ids[1:][answer[1:]]))
            else:
                before = backbone.model(**given).logits[0, :-1].log_softmax(-1)
                kept = answer[1:] if config.locality_on == "answer" else torch.ones_like(answer[1:])
                p, q = (before, logp) if config.locality_direction == "forward" else (logp, before)
                kls.append(F.kl_div(q, p, log_target=True, reduction="none").sum(-1)[kept].mean())
    edit, locality = torch.stack(edit_losses).mean(), torch.stack(kls).mean()
    return {"loss": config.edit_weight * edit + config.locality_weight * locality, "edit": edit, "locality": locality}


LOSSES = [
    EditLoss(),
    EditLoss(0.7, 0.5, locality_on="answer", locality_direction="reverse", chunk=7),
]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("loss", LOSSES, ids=["published", "other switches"])
def test_edits_in_parallel_are_edits_one_by_one_with_written_weights(
    build_mend: Callable[..., MEND], records: list[EditRecord], kind: str, loss: EditLoss
) -> None:
    """Losses, and gradients of everything that is trained, in double precision."""
    module = build_mend(kind, loss=loss)
    module.double()
    module.deltas.backbone.model.double()
    close = {"rtol": 1e-7, "atol": 1e-9} if kind != "gptj" else {"rtol": 1e-3, "atol": 1e-4}  # its attention is fp32
    batch = batch_of(module, records)
    expected, found = plain_losses(module, records, batch), module.losses(batch)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")
    wanted, got = gradients(module, expected["loss"]), gradients(module, found["loss"])
    assert wanted.keys() == got.keys() == {n for n, _ in module.named_parameters()}
    for name, gradient in wanted.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, **close, msg=lambda m, n=name: f"{n}: {m}")
    assert not any(p.requires_grad or p.grad is not None for p in module.deltas.backbone.model.parameters())


def test_gradient_checkpointing_changes_nothing(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    """The edited layers are in the middle, so that layers above them are run again after the terms are gone."""
    layers = EditedLayers([1, 2], ["mlp.down_proj"])
    plain, again = (build_mend(layers=layers, gradient_checkpointing=on) for on in (False, True))
    batch = batch_of(plain, records)
    expected = gradients(plain, plain.losses(batch, training=True)["loss"])
    runs: list[object] = []
    _, _, top, _ = again.deltas.backbone.layers
    top.mlp.register_forward_pre_hook(lambda *_: runs.append(None))
    loss = again.losses(batch, training=True)["loss"]
    passes = len(runs)
    found = gradients(again, loss)
    assert len(runs) == passes + 1  # run again: of the queries' pass, whose backward pass this is
    # outside of training the model is an ordinary one, which generates with a cache
    assert not any(m.training for m in again.deltas.backbone.model.modules())
    with plain.editor().edit(plain.deltas.backbone, []) as one, again.editor().edit(again.deltas.backbone, []) as two:
        assert one.generate(PROMPTS, 6) == two.generate(PROMPTS, 6)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9)


def test_splitting_a_batch_changes_nothing(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    module = build_mend()
    module.double()
    module.deltas.backbone.model.double()
    batch = batch_of(module, records)
    whole = module.losses(batch)
    expected = gradients(module, whole["loss"])
    halves = [module.collator()([Slot(r, i, 50 + i) for i, r in enumerate(records)][at : at + 2]) for at in (0, 2)]
    losses = [module.losses(half) for half in halves]
    for name, value in whole.items():
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, value)
    split = gradients(module, (losses[0]["loss"] + losses[1]["loss"]) / 2)
    for name, gradient in expected.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-7, atol=1e-10)


def test_without_a_query_to_leave_alone_locality_is_zero(
    build_mend: Callable[..., MEND], records: list[EditRecord]
) -> None:
    module = build_mend(queries=EditQueries(locality_from="others"))
    batch = batch_of(module, [replace(records[0], locality={})])
    assert batch.in_scope.all()
    parts = module.losses(batch)
    assert parts["locality"] == 0
    torch.testing.assert_close(parts["loss"], 0.1 * parts["edit"])
    assert all(g.isfinite().all() for g in gradients(module, parts["loss"]).values())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gptj"])
@pytest.mark.parametrize("again", [False, True])
def test_layers_below_the_edited_ones_run_once_for_locality(
    build_mend: Callable[..., MEND], records: list[EditRecord], kind: str, again: bool
) -> None:
    """And the divergence is that from the unedited model all the same."""
    module = build_mend(kind, layers=EditedLayers([-1, 2]), gradient_checkpointing=again)
    backbone, batch = module.deltas.backbone, batch_of(module, records)
    ran = [0] * 4
    handles = [
        backbone.attention(i).register_forward_hook(lambda *_, i=i: ran.__setitem__(i, ran[i] + 1)) for i in range(4)
    ]
    with torch.no_grad():
        found = module.losses(batch, training=True)["locality"]
    upper = 3 + again  # the edits' gradient runs these once more
    assert ran == [2, 2, upper, upper]  # edits; queries; the unedited model's queries, from layer 2 on
    for handle in handles:
        handle.remove()
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in backbone.layers)
    divergences = []
    for record, row in zip(records, (~batch.in_scope).nonzero()[:, 0], strict=True):
        length = int(batch.queries_mask[row].sum())
        ids = batch.queries[row, :length][None]
        with module.editor().edit(backbone, [record.request]) as edited, torch.no_grad():
            hidden = [m.decode(ids, torch.ones_like(ids))[0].last_hidden_state for m in (Edited(backbone), edited)]
        before, after = (backbone.logits(h[0, :-1]).log_softmax(-1) for h in hidden)
        divergences.append(F.kl_div(after, before, reduction="none", log_target=True).sum(-1).mean())
    torch.testing.assert_close(found, torch.stack(divergences).mean(), rtol=1e-3, atol=1e-5)


def test_a_pool_of_edits_is_their_sum(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    module = build_mend(queries=EditQueries(locality=0))
    batch = batch_of(module, records, [0, 0, 0, 1])
    assert (batch.pools, len(batch.edits)) == (2, 4)
    found = module.losses(batch)["edit"]
    singles = []
    for pool in (records[:3], records[3:]):
        with module.editor().edit(module.deltas.backbone, [r.request for r in pool]) as edited:
            for b in [i for i, r in enumerate(records) if r in pool]:
                length = int(batch.queries_mask[b].sum())
                ids, answer = batch.queries[b, :length], batch.queries_answer[b, :length]
                hidden = edited.decode(ids[None], torch.ones(1, length).long())[0].last_hidden_state
                logp = module.deltas.backbone.logits(hidden[0, :-1]).log_softmax(-1)
                singles.append(F.nll_loss(logp[answer[1:]], ids[1:][answer[1:]]))
    torch.testing.assert_close(found, torch.stack(singles).mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pools", [[0, 0, 0, 0], [7, 2, 7, 7]])
def test_queries_of_a_pool_share_its_term(
    build_mend: Callable[..., MEND], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch, pools: list[int]
) -> None:
    """The same losses and gradients as where each query has a copy, which none has."""
    module = build_mend(queries=EditQueries(generality=2))
    for m in (module, module.deltas.backbone.model):
        m.double()
    batch = batch_of(module, [replace(records[0], locality={}), *records[1:]], pools)
    found = module.losses(batch)
    gathered = gradients(module, found["loss"])
    with monkeypatch.context() as m:
        m.setattr(Pooled, "__call__", lambda self, x: self.term[self.pool](x))
        expected = module.losses(batch)
        wanted = gradients(module, expected["loss"])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gathered, wanted)
    monkeypatch.setattr(LowRank, "__getitem__", lambda *_: pytest.fail("a copy for each query"))
    module.losses(batch)


def test_statistics_are_taken_in_at_the_end_of_an_optimizer_step(
    build_mend: Callable[..., MEND], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build_mend(moved=False)
    counts = []
    module._trainer = SimpleNamespace(accumulate_grad_batches=2, global_step=0, log_every_n_steps=10)  # type: ignore[assignment]
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    batch = batch_of(module, records)
    statistics: Any = module.deltas.network.statistics["48x32"]
    first = int(statistics.count)
    for i in range(4):
        module.training_step(batch, i)
        counts.append(int(statistics.count) // first)
    assert counts == [1, 3, 3, 5]  # the same records as in the calibration, two micro-batches a step


def test_bf16_backbone_trains_an_fp32_hypernetwork(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    exact, module = (build_mend(mend=MendConfig(rank=8, edit_lr=1e-3)) for _ in range(2))
    module.deltas.backbone.model.bfloat16()
    batch = batch_of(module, records)
    parts, wanted = module.losses(batch), exact.losses(batch)
    torch.testing.assert_close(parts["edit"].float(), wanted["edit"], rtol=0.02, atol=0.02)
    found, expected = gradients(module, parts["loss"]), gradients(exact, wanted["loss"])
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    together = [torch.cat([g[name].flatten() for name in expected]) for g in (found, expected)]
    assert F.cosine_similarity(*together, dim=0) > 0.95


def test_one_batch_is_overfitted(build_mend: Callable[..., MEND], records: list[EditRecord]) -> None:
    module = build_mend(moved=False, mend=MendConfig(rank=16), loss=EditLoss(edit_weight=1.0))
    batch = batch_of(module, records)
    module.optimizer_config = HyperOptimizer(lr=3e-3, rates_lr=3e-3)
    optimizer = module.configure_optimizers()["optimizer"]
    losses = []
    for _ in range(60):
        loss = module.losses(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


def test_the_step_sizes_have_a_rate_of_their_own(build_mend: Callable[..., MEND]) -> None:
    module = build_mend(optimizer=HyperOptimizer(lr=2e-6, rates_lr=3e-4))
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [g["lr"] for g in groups] == [2e-6, 3e-4]
    assert groups[1]["params"][0] is module.deltas.network.edit_lr
    assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))  # each once


def test_what_cannot_be_edited_is_refused(build_mend: Callable[..., MEND], tiny_config) -> None:
    module = build_mend()
    other = load_backbone(tiny_config("llama", intermediate_size=64))
    with pytest.raises(ValueError, match="cannot edit"), module.editor().edit(other, []):
        pass
    with (
        pytest.raises(ValueError, match="one token has nothing to predict"),
        module.editor().edit(module.deltas.backbone, [EditRequest(text="A")]),
    ):
        pass
    for layers in ([4], [-5], []):
        with pytest.raises(ValueError, match=r"layers\.layers must be among 0 to 3"):
            MEND(tiny_config(), layers=EditedLayers(layers)).configure_model()
    with pytest.raises(ValueError, match=r"no layer .*mlp\.nothing"):
        MEND(tiny_config(), layers=EditedLayers([0], ["mlp.nothing"])).configure_model()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: MendConfig(rank=0), "rank"),
        (lambda: EditLoss(edit_weight=-1.0), "edit_weight"),
        (lambda: HyperOptimizer(lr=0.0), r"optimizer\.lr"),
        (lambda: MEND(BackboneConfig("random:llama"), calibration_records=0), "calibration_records"),
    ],
)
def test_wrong_settings_are_named(make: Callable[[], Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make()


@pytest.mark.parametrize(("precision", "zero"), [("bf16-mixed", True), ("16-mixed", False), ("bf16-true", False)])
def test_precisions_that_round_the_hypernetwork_are_refused(tiny_config, precision: str, zero: bool) -> None:
    module = MEND(tiny_config())
    strategy = SimpleNamespace(hold=None) if zero else SimpleNamespace()
    with pytest.raises(ValueError, match=rf"trainer\.precision {precision}"):
        module.check(SimpleNamespace(precision=precision, strategy=strategy))  # type: ignore[arg-type]
    module.check(SimpleNamespace(precision="32-true", strategy=strategy))  # type: ignore[arg-type]


def test_checkpoint_holds_the_hypernetwork_alone(build_mend: Callable[..., MEND]) -> None:
    module = build_mend()
    names = set(module.state_dict())
    assert names == module.trained_names()
    assert {n.split(".")[1] for n in names} == {"network"}
    assert "model.network.statistics.48x32.mean" in names
    with pytest.raises(ValueError, match="does not fit"):
        module.on_load_checkpoint({"state_dict": {"model.x": torch.ones(1)}})
