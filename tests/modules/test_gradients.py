"""Gradient factors against autograd's own weight gradients, in double precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from modules.backbone import Backbone
from modules.gradients import gradient_factors, predicting
from modules.interventions import LowRank, checkpointed, linear, low_rank, shape

KINDS = ["llama", "qwen3", "gpt2", "gpt_neox", "gptj"]


def names_of(backbone: Backbone, layers: tuple[int, ...] = (1, 3)) -> list[str]:
    return [f"{backbone.parts.layers}.{i}.{name}" for i in layers for name in backbone.parts.mlp]


def edits(rows: int = 4, width: int = 11) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and answer of right-padded rows of unequal lengths."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 200, (rows, width), generator=draw)
    mask, answer = torch.ones_like(ids), torch.zeros(rows, width, dtype=torch.bool)
    for i in range(rows):
        end = width - 2 * i
        mask[i, end:] = 0
        answer[i, end - 2 - i % 2 : end] = True
    return ids, mask, answer


def weight_gradients(backbone: Backbone, names: list[str], ids: Tensor, answer: Tensor) -> tuple[list[Tensor], Tensor]:
    """Of one unpadded row's loss, as [d_in, d_out], by autograd alone."""
    weights: list[nn.Parameter] = [linear(backbone.model, n).weight.requires_grad_(True) for n in names]  # type: ignore
    logits = backbone.model(ids[None]).logits[0, :-1]
    loss = F.cross_entropy(logits[answer[1:]], ids[1:][answer[1:]])
    grads = torch.autograd.grad(loss, weights)
    backbone.model.requires_grad_(False)
    conv = [isinstance(linear(backbone.model, n), Conv1D) for n in names]
    return [g if c else g.T for g, c in zip(grads, conv, strict=True)], loss.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_factors_multiply_to_the_weight_gradient_of_each_row_alone(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    backbone.model.double()
    close = {"rtol": 1e-9, "atol": 1e-12} if kind != "gptj" else {"rtol": 1e-4, "atol": 1e-7}  # its attention is fp32
    names = names_of(backbone)
    ids, mask, answer = edits()
    found, losses = gradient_factors(backbone, names, ids, mask, answer)
    assert list(found) == names
    for i in range(len(ids)):
        length = int(mask[i].sum())
        expected, loss = weight_gradients(backbone, names, ids[i, :length], answer[i, :length])
        torch.testing.assert_close(losses[i], loss, **close)
        for name, gradient in zip(names, expected, strict=True):
            factors = found[name]
            assert (factors.h.shape[2], factors.u.shape[2]) == shape(backbone.model, name) == tuple(gradient.shape)
            torch.testing.assert_close(factors.h[i].T @ factors.u[i], gradient, **close)
            assert gradient.abs().max() > 1e-6
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())
    for name in names:  # the same from the tokens alone: what the mask leaves out adds nothing
        s, edit = found[name].tokens()
        d_in = shape(backbone.model, name)[0]
        for i in range(len(ids)):
            h, u = s[edit == i].split([d_in, s.shape[1] - d_in], dim=1)
            torch.testing.assert_close(h.T @ u, found[name].h[i].T @ found[name].u[i], rtol=1e-9, atol=1e-12)


def test_masks(tiny: Callable[..., Backbone]) -> None:
    """Padding and the last token have no gradient; in the last layer only the tokens that predict the target have."""
    backbone = tiny()
    names = names_of(backbone)
    ids, mask, answer = edits()
    found, _ = gradient_factors(backbone, names, ids, mask, answer)
    first, last = found[names[0]], found[names[-1]]
    assert torch.equal(last.mask, predicting(answer))
    before_last = mask.bool() & torch.cat([mask[:, 1:].bool(), torch.zeros(len(mask), 1).bool()], 1)
    assert torch.equal(first.mask, before_last)
    assert torch.equal(first.at(predicting(answer)).mask, predicting(answer))
    assert not first.u[~first.mask].any()


def test_rows_are_independent(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    names = names_of(backbone)
    ids, mask, answer = edits()
    found, _ = gradient_factors(backbone, names, ids, mask, answer)
    other = ids.clone()
    other[1:] = (other[1:] + 17) % 200
    changed, _ = gradient_factors(backbone, names, other, mask, answer)
    for name in names:
        torch.testing.assert_close(changed[name].u[0], found[name].u[0], rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(changed[name].h[0], found[name].h[0])
        assert not torch.allclose(changed[name].u[1:], found[name].u[1:], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_nothing(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    names = names_of(backbone)
    given = edits()
    plain, losses = gradient_factors(backbone, names, *given)
    with checkpointed(backbone.model):
        again, losses_again = gradient_factors(backbone, names, *given)
    assert torch.equal(losses, losses_again)
    for name in names:
        for field in ("h", "u", "mask"):
            assert torch.equal(getattr(plain[name], field), getattr(again[name], field))


def test_within_inference_mode_and_on_an_edited_model(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    names = names_of(backbone)
    given = edits()
    plain, _ = gradient_factors(backbone, names, *given)
    with torch.inference_mode():
        again, _ = gradient_factors(backbone, names, *(t.clone() for t in given))
    assert all(torch.equal(plain[n].u, again[n].u) for n in names)
    d_in, d_out = shape(backbone.model, names[0])
    term = LowRank(torch.randn(1, 2, d_in), torch.randn(1, 2, d_out))
    with low_rank(backbone.model, {names[0]: term}):
        edited, _ = gradient_factors(backbone, names, *given)
    assert not torch.allclose(edited[names[-1]].u, plain[names[-1]].u, atol=1e-5)
    assert not backbone.model.get_submodule(names[0])._forward_hooks


def test_bf16_backbone_gives_fp32_factors(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    names = names_of(backbone)
    given = edits()
    exact, _ = gradient_factors(backbone, names, *given)
    backbone.model.bfloat16()
    rough, _ = gradient_factors(backbone, names, *given)
    for name in names:
        assert rough[name].h.dtype == rough[name].u.dtype == torch.float32
        similar = F.cosine_similarity(rough[name].u.flatten(), exact[name].u.flatten(), dim=0)
        assert similar > 0.98


def test_nothing_to_predict_is_refused(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    ids, mask, answer = edits()
    with pytest.raises(ValueError, match="no edit has a token to predict"):
        gradient_factors(backbone, names_of(backbone), ids, mask, torch.zeros_like(answer))
