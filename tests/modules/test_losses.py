"""Each loss against a few lines of plain torch, in float64. n tokens, d hidden, V vocabulary, R records."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules import losses
from modules.losses import (
    Head,
    edit_sensitivity,
    head_of,
    mean_per_row,
    token_ce_and_kl,
    token_cross_entropy,
    token_kl,
    token_log_probs,
    weighted_mean,
)

N, D, V = 11, 5, 13
CHUNKS = [1, 7, N, N + 5]
DIRECTIONS = ["forward", "reverse"]


@pytest.fixture
def case():
    """Student and teacher of different hidden sizes, one ignored label, a first weight of 0."""
    make = torch.Generator().manual_seed(0)

    def normal(*shape, grad=False):
        return torch.randn(*shape, generator=make, dtype=torch.float64).requires_grad_(grad)

    labels = torch.randint(0, V, (N,), generator=make)
    labels[3] = -100
    weights = torch.rand(N, generator=make, dtype=torch.float64) + 0.5
    weights[0] = 0
    return SimpleNamespace(
        h=normal(N, D, grad=True),
        head=Head(normal(V, D, grad=True), normal(V, grad=True)),
        labels=labels,
        teacher_h=normal(N, D + 1, grad=True),
        teacher_head=Head(normal(V, D + 1, grad=True), normal(V, grad=True)),
        weights=weights,
    )


def plain_ce(case):
    logits = case.h @ case.head.weight.T + case.head.bias
    kept = case.labels != -100
    picked = logits.softmax(-1)[torch.arange(len(logits)), case.labels.clamp(min=0)]
    return torch.where(kept, -picked.log(), torch.zeros_like(picked))


def plain_kl(case, direction="forward", temperature=1.0):
    width = min(len(case.head.weight), len(case.teacher_head.weight))
    student = (F.linear(case.h, *case.head)[:, :width] / temperature).softmax(-1)
    teacher = (F.linear(case.teacher_h, *case.teacher_head)[:, :width] / temperature).softmax(-1).detach()
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    return (p * (p / q).log()).sum(-1)


def gradients(case, values):
    """Of a weighted sum, with respect to all that the student learns."""
    return torch.autograd.grad((case.weights.to(values.dtype) * values).sum(), (case.h, *case.head))


def assert_same(case, values, expected):
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(gradients(case, values), gradients(case, expected))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_cross_entropy(case, chunk):
    assert_same(case, token_cross_entropy(case.h, case.head, case.labels, chunk), plain_ce(case))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kl(case, chunk, direction, temperature):
    values = token_kl(case.h, case.head, case.teacher_h, case.teacher_head, chunk, direction, temperature)
    assert_same(case, values, plain_kl(case, direction, temperature))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_is_that_of_torch(case, direction):
    student, teacher = case.head.log_probs(case.h), case.teacher_head.log_probs(case.teacher_h)
    p, q = (teacher, student) if direction == "forward" else (student, teacher)
    values = token_kl(case.h, case.head, case.teacher_h, case.teacher_head, direction=direction)
    torch.testing.assert_close(values.sum(), F.kl_div(q, p, reduction="sum", log_target=True))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_both_in_one_walk(case, chunk, direction):
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, chunk, direction, 1.5)
    assert_same(case, ce, plain_ce(case))
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, chunk, direction, 1.5)
    assert_same(case, kl, plain_kl(case, direction, 1.5))
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, chunk, direction, 1.5)
    assert_same(case, ce + kl, plain_ce(case) + plain_kl(case, direction, 1.5))


@pytest.mark.parametrize("columns", [-1, 1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_teacher_of_another_width(case, columns, direction):
    """A narrower or wider teacher: both are normalised over the columns they share; the cross-entropy is not cut."""
    case.teacher_head = Head(torch.randn(V + columns, D + 1, dtype=torch.float64))
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, 4, direction)
    torch.testing.assert_close(ce, plain_ce(case))
    assert_same(case, kl, plain_kl(case, direction))


@pytest.mark.parametrize("chunk", [2, 8])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradcheck(case, chunk, direction):
    def both(h, weight, bias):
        return token_ce_and_kl(
            h, Head(weight, bias), case.labels[:5], case.teacher_h[:5], case.teacher_head, chunk, direction, 1.5
        )

    assert torch.autograd.gradcheck(both, (case.h[:5].detach().requires_grad_(), *case.head))


@pytest.mark.parametrize("chunk", [4, N])
def test_each_token_keeps_its_own_weight(case, chunk):
    """A first weight of 0 leaves the other tokens' gradients alone, and each scales with its own weight."""
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, chunk)
    (ones,) = torch.autograd.grad((ce + kl).sum(), case.h, retain_graph=True)
    (weighted,) = torch.autograd.grad(((ce + kl) * case.weights).sum(), case.h)
    assert weighted[0].count_nonzero() == 0
    assert ones[0].count_nonzero() > 0
    torch.testing.assert_close(weighted, ones * case.weights[:, None])


@pytest.mark.parametrize("chunk", [4, N])
def test_all_weights_zero(case, chunk):
    case.weights.zero_()
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, chunk)
    loss = weighted_mean(ce + kl, case.weights, torch.zeros(N, dtype=torch.long), num_rows=1)
    assert loss.tolist() == [0]
    assert all(g.count_nonzero() == 0 for g in torch.autograd.grad(loss.sum(), (case.h, *case.head)))


@pytest.mark.parametrize("chunk", [4, N])
def test_ignored_labels_everywhere(case, chunk):
    values = token_cross_entropy(case.h, case.head, torch.full_like(case.labels, -100), chunk)
    assert values.tolist() == [0] * N
    assert all(g.count_nonzero() == 0 for g in gradients(case, values))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_kl_of_equals_is_zero(case, direction):
    values = token_kl(case.h, case.head, case.h, case.head, 4, direction)
    torch.testing.assert_close(values, torch.zeros_like(values))
    assert all(g.abs().max() < 1e-12 for g in gradients(case, values))


def test_the_teacher_gets_no_gradient(case):
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels, case.teacher_h, case.teacher_head, 4)
    (ce + kl).sum().backward()
    assert all(x.grad is None for x in (case.teacher_h, *case.teacher_head))
    assert all(x.grad is not None for x in (case.h, *case.head))


def test_frozen_head(case):
    head = Head(case.head.weight.detach(), case.head.bias.detach())
    (grad,) = torch.autograd.grad(token_cross_entropy(case.h, head, case.labels, 4).sum(), case.h)
    (expected,) = torch.autograd.grad(plain_ce(case).sum(), case.h)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_no_tokens(case, bias):
    case.h = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    case.head = case.head if bias else Head(case.head.weight)
    ce, kl = token_ce_and_kl(case.h, case.head, case.labels[:0], case.teacher_h[:0], case.teacher_head)
    rows = torch.zeros(0, dtype=torch.long)
    loss = (ce + kl).sum() + mean_per_row(ce, rows, 2).sum() + token_cross_entropy(case.h, case.head, rows).sum()
    assert (ce.shape, kl.shape, loss.item()) == ((0,), (0,), 0)
    learned = [x for x in (case.h, *case.head) if x is not None]
    assert all(g.count_nonzero() == 0 and g.isfinite().all() for g in torch.autograd.grad(loss, learned))


def test_half_precision_counts_in_float32(case):
    """bf16 heads: the values are float32, and as close to those of float64 as bf16 logits allow."""
    h, weight, bias, teacher_h, *teacher = (
        x.detach().bfloat16().requires_grad_() for x in (case.h, *case.head, case.teacher_h, *case.teacher_head)
    )
    ce, kl = token_ce_and_kl(h, Head(weight, bias), case.labels, teacher_h, Head(*teacher), 4)
    assert ce.dtype == kl.dtype == torch.float32
    grads = torch.autograd.grad((case.weights * (ce + kl)).sum(), (h, weight, bias))
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3
    expected = plain_ce(case) + plain_kl(case)
    torch.testing.assert_close((ce + kl).double(), expected, rtol=0.03, atol=0.03)
    for grad, exact in zip(grads, gradients(case, expected), strict=True):
        assert F.cosine_similarity(grad.double().flatten(), exact.flatten(), dim=0) > 0.999


def test_log_probs_are_without_gradient(case):
    values = token_log_probs(case.h, case.head, case.labels, 4)
    assert not values.requires_grad
    torch.testing.assert_close(values, -plain_ce(case).detach())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("learn_head", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_logits_are_never_whole(learn_head, direction):
    n, d, vocab, chunk = 60, 4, 40, 6
    h = torch.randn(n, d, requires_grad=True)
    head, teacher = Head(torch.randn(vocab, d, requires_grad=learn_head)), Head(torch.randn(vocab, d))
    labels = torch.randint(0, vocab, (n,))
    with Largest() as largest:
        ce, kl = token_ce_and_kl(h, head, labels, torch.randn(n, d), teacher, chunk, direction)
        (ce + kl).sum().backward()
    assert largest.numel == max(n * d, chunk * vocab, vocab * d)
    with Largest() as largest:  # the measure itself sees whole logits, in the backward pass too
        F.cross_entropy(F.linear(h, head.weight), labels).backward()
    assert largest.numel == n * vocab


def test_nothing_as_wide_as_the_vocabulary_waits_for_the_backward_pass():
    n, d, vocab, chunk = 60, 4, 40, 6
    kept = []
    h, head = torch.randn(n, d, requires_grad=True), Head(torch.randn(vocab, d, requires_grad=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        token_ce_and_kl(
            h, head, torch.zeros(n, dtype=torch.long), torch.randn(n, d), Head(torch.randn(vocab, d)), chunk
        )
    assert not any(shape[-1:] == (vocab,) for shape in kept)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"direction": "sideways"}, "direction must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"teacher_h": torch.zeros(N - 1, D + 1)}, r"teacher_h has shape \[10, 6\]"),
        ({"labels": torch.zeros(1, N, dtype=torch.long)}, r"labels has shape \[1, 11\]"),
        ({"h": torch.zeros(1, N, D)}, r"h has shape \[1, 11, 5\]"),
    ],
)
def test_wrong_arguments(case, change, message):
    arguments = {name: getattr(case, name) for name in ("h", "head", "labels", "teacher_h", "teacher_head")} | change
    with pytest.raises(ValueError, match=message):
        token_ce_and_kl(**arguments)


def test_unknown_backend(case):
    with pytest.raises(ValueError, match="backend must be"):
        token_cross_entropy(case.h, case.head, case.labels, backend="fast")  # pyright: ignore


def test_old_liger_is_refused(case, monkeypatch):
    losses._liger_cross_entropy.cache_clear()
    monkeypatch.setattr(losses, "version", lambda name: "0.5.4")
    with pytest.raises(ImportError, match=r"liger-kernel 0\.5\.4 .* first token's weight; .*>=0\.8\.2"):
        token_cross_entropy(case.h, case.head, case.labels, backend="liger")


def test_liger_on_the_interpreter():
    """The checks of tests/gpu/test_losses_gpu.py without a GPU: Triton reads the variable when it is imported."""
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(root / "tests/gpu/test_losses_gpu.py")],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_edit_sensitivity():
    with_edit = torch.tensor([-1.0, -3.0, -2.0], requires_grad=True)
    without = torch.tensor([-4.0, -1.0, -2.0])
    weights = edit_sensitivity(with_edit, without, scale=0.5)
    assert weights.tolist() == [1.5, 0, 0]
    assert not weights.requires_grad
    assert edit_sensitivity(with_edit, without).tolist() == [3, 0, 0]


def test_weighted_mean():
    """Divided by the tokens with a weight, not by the weights; 0 for a record without any (rows 1 and 3)."""
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], requires_grad=True)
    weights = torch.tensor([0.5, 2.0, 0.0, 0.0, 3.0])
    rows = torch.tensor([0, 0, 0, 1, 2])
    means = weighted_mean(values, weights, rows, num_rows=4)
    assert means.tolist() == [(0.5 * 1 + 2 * 2) / 2, 0, 15, 0]
    (grad,) = torch.autograd.grad(means.sum(), values)
    assert grad.tolist() == [0.25, 1, 0, 0, 3]


def test_mean_per_row():
    values, rows = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2, 2, 0])
    assert mean_per_row(values, rows, num_rows=3).tolist() == [6, 0, 1.5]


class Model(nn.Module):
    def __init__(self, head, **config):
        super().__init__()
        self.head, self.config = head, SimpleNamespace(**config)

    def get_output_embeddings(self):
        return self.head


def test_head_of():
    linear = nn.Linear(D, V)
    assert head_of(Model(linear)) == (linear.weight, linear.bias)
    assert head_of(Model(nn.Linear(D, V, bias=False))).bias is None
    with pytest.raises(TypeError, match=r"plain nn\.Linear"):
        head_of(Model(nn.Sequential(linear)))
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        head_of(Model(linear, final_logit_softcapping=30.0))
