"""Similarities and losses against plain references."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from modules.losses import Head
from modules.serac.losses import mix, mixture_losses, scope_loss
from modules.serac.scope import ScopeClassifier, ScopeConfig


def test_similarities(scope_config: Callable[..., ScopeConfig]) -> None:
    torch.manual_seed(0)
    queries, edits = torch.randn(5, 32), torch.randn(3, 32)
    queries[4] = edits[1]
    distance = ScopeClassifier(scope_config())
    expected = -(queries[:, None] - edits[None]).square().sum(-1)
    torch.testing.assert_close(distance.log_similarity(queries, edits), expected, rtol=1e-4, atol=1e-4)
    similarity, edit = distance.nearest(queries, edits)
    assert edit.tolist() == expected.argmax(1).tolist()
    assert similarity[4] == pytest.approx(1.0, abs=1e-4)
    cosine = ScopeClassifier(scope_config(similarity="cosine"))
    expected = F.cosine_similarity(queries[:, None], edits[None], dim=-1) - 1
    torch.testing.assert_close(cosine.log_similarity(queries, edits), expected, rtol=1e-4, atol=1e-5)


def test_scope_loss() -> None:
    torch.manual_seed(0)
    log_s = -torch.rand(4, 2)
    positive = torch.tensor([[1.0, 0], [0, 0], [0, 1], [0, 0]])
    negative = torch.tensor([[0, 0.5], [1, 0], [0, 0], [0, 0.5]])
    inside, outside = scope_loss(log_s, positive, negative)
    s = log_s.exp()
    assert inside == pytest.approx(float(-(s[0, 0].log() + s[2, 1].log())))
    rest = -((1 - s[1, 0]).log() + 0.5 * (1 - s[0, 1]).log() + 0.5 * (1 - s[3, 1]).log())
    assert outside == pytest.approx(float(rest), rel=1e-5)


def test_equal_texts_out_of_scope_cost_a_finite_loss() -> None:
    log_s = torch.zeros(1, 1, requires_grad=True)
    _, outside = scope_loss(log_s, torch.zeros(1, 1), torch.ones(1, 1))
    outside.backward()
    assert outside.isfinite()
    assert log_s.grad is not None
    assert log_s.grad.isfinite().all()


def test_mixture_over_the_columns_that_both_have() -> None:
    """Qwen2.5-7B's head has more padding rows than Qwen2.5-0.5B's."""
    torch.manual_seed(0)
    base, other, s = torch.randn(4, 13), torch.randn(4, 11), torch.tensor([0.0, 0.3, 0.7, 1.0])
    expected = (1 - s)[:, None] * base[:, :11].softmax(-1) + s[:, None] * other.softmax(-1)
    torch.testing.assert_close(mix(s, base, other).exp(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [2, 1024])
def test_mixture_losses(chunk: int) -> None:
    torch.manual_seed(0)
    hidden, base = torch.randn(5, 8, requires_grad=True), torch.randn(5, 6)
    head, base_head = Head(torch.randn(11, 8)), Head(torch.randn(13, 6), torch.randn(13))
    s, labels = torch.rand(5, requires_grad=True), torch.tensor([0, 3, 10, 2, 5])
    ce, kl = mixture_losses(s, hidden, head, base, base_head, labels, chunk)
    p = (base @ base_head.weight.T + base_head.bias)[:, :11].softmax(-1)  # type: ignore[operator]
    mixed = (1 - s)[:, None] * p + s[:, None] * (hidden @ head.weight.T).softmax(-1)
    expected = -mixed[torch.arange(5), labels].log(), (p * (p / mixed).log()).sum(-1)
    torch.testing.assert_close(ce, expected[0])
    torch.testing.assert_close(kl, expected[1], rtol=1e-4, atol=1e-6)
    found = torch.autograd.grad(ce.sum() + kl.sum(), [s, hidden])
    wanted = torch.autograd.grad(expected[0].sum() + expected[1].sum(), [s, hidden])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
