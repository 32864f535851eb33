"""The Liger backend against plain torch. Without CUDA these run on Triton's interpreter, where TRITON_INTERPRET=1 is
set before Python starts (tests/modules/test_losses.py does that). n tokens, d hidden, V vocabulary.
"""

import os

import pytest
import torch
import torch.nn.functional as F

from modules.losses import Head, token_ce_and_kl, token_cross_entropy, token_log_probs

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA"),
]

N, D, V = 11, 8, 37  # D < V, so that Liger walks over the tokens in more than one chunk


def make(bias=True, dtype=torch.float32, learn_head=True):
    generator = torch.Generator().manual_seed(0)
    h, weight, b = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[3] = -100
    weights = torch.rand(N, generator=generator) + 0.5
    weights[0] = 0
    head = Head(weight.requires_grad_(learn_head), b.requires_grad_(learn_head) if bias else None)
    return h.requires_grad_(), head, labels.to(DEVICE), weights.to(DEVICE)


def gradients(values, weights, h, head):
    learned = [x for x in (h, *head) if x is not None and x.requires_grad]
    return torch.autograd.grad((weights * values).sum(), learned)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("learn_head", [True, False])
def test_values_and_weighted_gradients(bias, learn_head):
    h, head, labels, weights = make(bias, learn_head=learn_head)
    values = token_cross_entropy(h, head, labels, backend="liger")
    expected = F.cross_entropy(F.linear(h, *head), labels, reduction="none")
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    exact = gradients(expected, weights, h, head)
    torch.testing.assert_close(gradients(values, weights, h, head), exact, rtol=1e-4, atol=1e-5)


def test_each_token_keeps_its_own_weight():
    """A first weight of 0: before Liger 0.8.2 it emptied the gradient of every token."""
    h, head, labels, weights = make()
    (ones,) = torch.autograd.grad(token_cross_entropy(h, head, labels, backend="liger").sum(), h)
    values = token_cross_entropy(h, head, labels, backend="liger")
    grad, grad_weight, grad_bias = gradients(values, weights, h, head)
    torch.testing.assert_close(grad, ones * weights[:, None], rtol=1e-4, atol=1e-5)
    assert grad[0].count_nonzero() == 0
    assert grad[1].count_nonzero() > 0
    assert grad_weight.count_nonzero() > 0
    assert grad_bias.count_nonzero() > 0


@pytest.mark.parametrize("ignored", [True, False])
def test_nothing_to_learn(ignored):
    """Every label ignored, or every weight 0."""
    h, head, labels, weights = make()
    labels, weights = (labels.fill_(-100), weights) if ignored else (labels, weights.zero_())
    values = token_cross_entropy(h, head, labels, backend="liger")
    assert (weights * values).sum() == 0
    assert all(g.count_nonzero() == 0 for g in gradients(values, weights, h, head))


def test_no_tokens():
    h, head, labels, weights = make()
    values = token_cross_entropy(h[:0], head, labels[:0], backend="liger")
    assert values.shape == (0,)
    assert all(g.count_nonzero() == 0 for g in gradients(values, weights[:0], h, head))


def test_log_probs():
    h, head, labels, _ = make()
    values = token_log_probs(h, head, labels, backend="liger")
    assert not values.requires_grad
    torch.testing.assert_close(values, token_log_probs(h, head, labels, backend="torch"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "liger"])
def test_half_precision(backend):
    """bf16 logits: Liger adds the bias after rounding them, torch before, so they part by a step of bf16."""
    h, head, labels, weights = make(dtype=torch.bfloat16)
    values = token_cross_entropy(h, head, labels, chunk=4, backend=backend)
    expected = F.cross_entropy(F.linear(h, *head).float(), labels, reduction="none")
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, expected, rtol=0, atol=0.1)
    pairs = zip(gradients(values, weights, h, head), gradients(expected, weights, h, head), strict=True)
    for grad, exact in pairs:
        assert grad.dtype == torch.bfloat16
        assert F.cosine_similarity(grad.float().flatten(), exact.float().flatten(), dim=0) > 0.999


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_auto_is_liger():
    h, head, labels, _ = make()
    assert "Liger" in type(token_cross_entropy(h, head, labels).grad_fn).__name__


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_memory_of_the_walk(direction):
    """Cross-entropy and KL of 16,384 tokens stay below one set of [n, V] float32 logits."""
    n, d, vocab = 16_384, 64, 32_000
    h, teacher_h = torch.randn(2, n, d, device=DEVICE, dtype=torch.bfloat16)
    head, teacher = (Head(torch.randn(vocab, d, device=DEVICE, dtype=torch.bfloat16)) for _ in range(2))
    labels = torch.randint(0, vocab, (n,), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ce, kl = token_ce_and_kl(h.requires_grad_(), head, labels, teacher_h, teacher, direction=direction)
    (ce + kl).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 4 * n * vocab
