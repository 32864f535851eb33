"""FT-L, FT-M and FT with the elastic net: losses and steps against weights that are really written."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import linear
from modules.training_free.ft import FTEAC, FTL, FTM, ElasticChange, ElasticNet
from modules.training_free.shared import encode_targets
from modules.training_free.terms import Dense
from modules.training_free.tuned import edit_losses, ready


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [record.request for record in records]


def plain_loss(backbone: Backbone, model: Any, request: EditRequest, prompt_last: bool) -> Tensor:
    row = encode(backbone.tokenizer, request.prompt, request.target)
    logits = model(torch.tensor([row.ids])).logits[0]
    at = [row.target_start - 1 if prompt_last else i - 1 for i in range(row.target_start, len(row.ids))]
    return F.cross_entropy(logits[at], torch.tensor(row.target_ids))


@pytest.mark.parametrize("editor", [FTL, FTM])
def test_the_loss_is_the_plain_one(tiny: Callable[..., Backbone], requests: list[EditRequest], editor: Any) -> None:
    backbone = tiny()
    rows = encode_targets(backbone, requests)
    found = edit_losses(backbone, ready(backbone, rows, editor.objective, editor(layers=[2]).names(backbone)))
    expected = [plain_loss(backbone, backbone.model, r, editor is FTL) for r in requests]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("editor", [FTL, FTM])
@pytest.mark.parametrize("bound", [None, 0.01])
def test_steps_are_those_of_adam_on_the_weights(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, editor: Any, bound: float | None
) -> None:
    """As released: the weights themselves are trained and clamped about what they were; in float64."""
    backbone = tiny(kind)
    backbone.model.double()
    model: Any = copy.deepcopy(backbone.model)
    ft = editor(layers=[1, 2], steps=6, lr=4e-3, norm_constraint=bound, stop_at=0.0)
    names = ft.names(backbone)
    trained = [linear(model, name).weight.requires_grad_() for name in names]
    before = [w.detach().clone() for w in trained]
    adam = torch.optim.Adam(trained, lr=4e-3)  # type: ignore[arg-type]
    for _ in range(6):
        adam.zero_grad()
        torch.stack([plain_loss(backbone, model, r, editor is FTL) for r in requests[:2]]).mean().backward()
        adam.step()
        if bound:
            for w, old in zip(trained, before, strict=True):
                w.data = old + (w.data - old).clamp(-bound, bound)
    with ft.edit(backbone, requests[:2]) as edited:
        for name, w, old in zip(names, trained, before, strict=True):
            d = edited.terms[name].d[0]
            change = (w.detach() - old).T if kind == "llama" else w.detach() - old
            torch.testing.assert_close(d.double(), change, rtol=1e-2, atol=2e-5)
            assert bound is None or float(d.abs().max()) <= bound * (1 + 1e-6)
            assert float(d.abs().max()) > 0.009


def test_enough_steps_make_the_target_certain(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    backbone = tiny()
    asked = [r.prompt for r in requests], [r.target for r in requests]
    assert min(s.accuracy for s in Edited(backbone).score(*asked)) < 1
    with FTM(layers=[2], steps=100, lr=1e-2).edit(backbone, requests) as edited:
        assert all(score.accuracy == 1 for score in edited.score(*asked))
    one = requests[0]
    with FTM(layers=[2], steps=100, lr=1e-2).edit(backbone, [one]) as edited:
        rise = edited.score([one.prompt], [one.target])[0].log_probs - Edited(backbone).score(*asked)[0].log_probs
        assert float(rise.min()) > 3  # a random model of width 32 cannot be sure of anything
    row = encode(backbone.tokenizer, one.prompt, one.target)
    given = torch.tensor([row.ids]), torch.ones(1, len(row.ids))

    def at_the_last_prompt_token(edited: Edited) -> Tensor:
        hidden = edited.decode(*given)[0].last_hidden_state[0, row.target_start - 1]
        return backbone.logits(hidden).log_softmax(-1)[list(set(row.target_ids))]

    with FTL(layers=[2], steps=100, lr=1e-2).edit(backbone, [one]) as edited:
        assert float((at_the_last_prompt_token(edited) - at_the_last_prompt_token(Edited(backbone))).mean()) > 2


def test_early_stop(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    backbone = tiny()
    with FTM(stop_at=1e3).edit(backbone, requests) as edited:
        assert not any(bool(t.d.any()) for t in edited.terms.values())


def test_a_batch_takes_a_step_for_each_part_of_it(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    """Two parts in one pass go further than one step, and see both edits."""
    backbone = tiny()
    sizes = []
    for batch_size in (4, 2):
        with FTM(steps=1, lr=1e-2, batch_size=batch_size, layers=[1]).edit(backbone, requests) as edited:
            sizes.append(max(float(t.d.abs().max()) for t in edited.terms.values()))
    assert sizes[0] == pytest.approx(1e-2, rel=1e-3)
    assert sizes[1] > 1.5e-2


def test_dense_terms_of_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    x, d = torch.randn(3, 5, 4, generator=draw), torch.randn(3, 4, 2, generator=draw)
    torch.testing.assert_close(Dense(d)(x), torch.stack([x[i] @ d[i] for i in range(3)]))
    torch.testing.assert_close(Dense(d[:1])(x), x @ d[0])
    with pytest.raises(ValueError, match="3 rows met a batch of 2"):
        Dense(d)(x[:2])


# ---------------------------------------------------------------------- the elastic net


def test_the_net_is_five_lines() -> None:
    net = ElasticNet(l1=0.02, l2=0.3, score_steps=2, epsilon=0.1)
    change = ElasticChange({"w": (2, 3)}, 2, None, torch.device("cpu"), net, lr=0.5)
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(2, 2, 3, generator=draw) for _ in range(2)]
    d = torch.randn(2, 2, 3, generator=draw)
    with torch.no_grad():
        change.leaves[0].copy_(d)
        for g in gradients:
            assert not change.settled
            assert not change.penalty().any()
            change.step([g])
            change.passed()
        assert change.settled
        assert torch.equal(change.leaves[0], d)  # the first steps are free
    weight = 1 / ((sum(gradients) / 2 * d).abs() + 0.1)
    expected = 0.02 * (weight * d.abs()).sum((1, 2)) + 0.3 * d.square().sum((1, 2))
    penalty = change.penalty()
    torch.testing.assert_close(penalty.detach(), expected)
    torch.testing.assert_close(torch.autograd.grad(penalty.sum(), change.leaves)[0], 0.6 * d)
    with torch.no_grad():
        change.step([torch.zeros_like(d)])
    torch.testing.assert_close(change.leaves[0].detach(), F.softshrink(d / (0.01 * weight), 1.0) * 0.01 * weight)


def test_a_net_of_nothing_is_plain_ft_and_a_strong_one_leaves_less(
    tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone = tiny()
    settings: dict[str, Any] = {"layers": [1], "steps": 8, "lr": 5e-3, "stop_at": 0.0}

    def change(editor: FTM) -> Tensor:
        with editor.edit(backbone, requests[:1]) as edited:
            (term,) = edited.terms.values()
            return term.d

    plain = change(FTM(**settings))
    assert torch.equal(change(FTEAC(**settings, net=ElasticNet(0.0, 0.0, 3))), plain)
    sparse = change(FTEAC(**settings, net=ElasticNet(l1=1e-4, l2=0.0, score_steps=3)))
    assert float((sparse == 0).float().mean()) > 0.1 + float((plain == 0).float().mean())
    small = change(FTEAC(**settings, net=ElasticNet(l1=0.0, l2=5.0, score_steps=3)))
    assert 0 < float(small.norm()) < 0.9 * float(plain.norm())
    last = change(FTEAC(**settings, net=ElasticNet(0.0, 0.0, 3), prompt_last=True))
    assert torch.equal(last, change(FTL(**settings)))


def test_all_edits_make_the_scores(tiny: Callable[..., Backbone], requests: list[EditRequest], monkeypatch) -> None:
    """However few of them fit a batch."""
    taken = []
    plain = ElasticChange.passed
    monkeypatch.setattr(ElasticChange, "passed", lambda self: (taken.append((self.taken, self.settled)), plain(self)))
    editor = FTEAC(layers=[1], steps=5, batch_size=1, stop_at=0.0, net=ElasticNet(score_steps=3))
    with editor.edit(tiny(), requests[:2]):
        assert taken == [(2, False), (4, False), (6, False), (6, True), (6, True)]


@pytest.mark.parametrize(
    ("wrong", "name"),
    [
        ({"norm_constraint": 0.0}, "norm_constraint"),
        ({"modules": "attention"}, "modules"),
    ],
)
def test_settings_that_cannot_be(wrong: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FTM(**wrong)


def test_steps_must_leave_some_for_the_net() -> None:
    with pytest.raises(ValueError, match="score_steps"):
        FTEAC(steps=10)
    with pytest.raises(ValueError, match="epsilon"):
        ElasticNet(epsilon=0.0)


def test_a_layer_that_is_not_there(tiny: Callable[..., Backbone], requests: list[EditRequest]) -> None:
    with pytest.raises(ValueError, match="layers must be numbers"), FTM(layers=[9]).edit(tiny(), requests):
        pass
