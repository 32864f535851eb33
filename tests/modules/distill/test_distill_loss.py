"""The loss against plain torch: whole distributions, and parts of them."""

import pytest
import torch
from torch import Tensor

from modules.distill.loss import Full, Top, kept_kl, top_of
from modules.losses import Head

N, D, V = 11, 8, 40


@pytest.fixture
def made() -> tuple[Tensor, Tensor, Head]:
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(N, D, generator=draw, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(*size, generator=draw, dtype=torch.float64) for size in ((V, D), (V,)))
    return student, teacher, Head(weight, bias)


def reference(student: Tensor, teacher: Tensor, head: Head) -> Tensor:
    p = (teacher @ head.weight.T + head.bias).log_softmax(-1)
    q = (student @ head.weight.T + head.bias).log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def test_whole(made: tuple[Tensor, Tensor, Head]) -> None:
    student, teacher, head = made
    expected = reference(student, teacher, head)
    torch.testing.assert_close(kept_kl(student, head, Full(teacher), chunk=4), expected)


@pytest.mark.parametrize("k", [1, 5, V - 1, V, V + 3])
def test_part(made: tuple[Tensor, Tensor, Head], k: int) -> None:
    """Never more than the whole; the same where all tokens are kept; and all that is missing is among the others."""
    student, teacher, head = made
    p, q = head.log_probs(teacher), head.log_probs(student)
    top, unseen = top_of(p, k)
    found = kept_kl(student, head, top, chunk=4)
    whole = reference(student, teacher, head)
    others = torch.ones_like(p).scatter(1, top.tokens, 0)
    rest_p, rest_q = ((x.exp() * others) for x in (p, q))
    within = rest_p * ((rest_p / rest_p.sum(1, keepdim=True)) / (rest_q / rest_q.sum(1, keepdim=True))).log()
    hidden = torch.nan_to_num(within).sum(1)
    torch.testing.assert_close(found + hidden, whole)
    assert (found <= whole + 1e-9).all()
    if k >= V - 1:
        torch.testing.assert_close(found, whole)
    even = rest_p * (rest_p / rest_p.sum(1, keepdim=True) * max(1, V - k)).log()
    torch.testing.assert_close(unseen, torch.nan_to_num(even).sum(1))


def test_gradient_does_not_hang_on_chunks(made: tuple[Tensor, Tensor, Head]) -> None:
    student, teacher, head = made
    top, _ = top_of(head.log_probs(teacher), 6)
    gradients = []
    for chunk in (3, 100):
        h = student.clone().requires_grad_()
        (kept_kl(h, head, top, chunk) * torch.arange(1.0, N + 1)).sum().backward()
        gradients.append(h.grad)
    torch.testing.assert_close(*gradients)
    assert torch.autograd.gradcheck(lambda h: kept_kl(h, head, top, 3), student.clone().requires_grad_())


def test_nothing_to_learn_from_oneself(made: tuple[Tensor, Tensor, Head]) -> None:
    student, _, head = made
    assert kept_kl(student, head, Full(student)).abs().max() < 1e-12
    assert kept_kl(student, head, top_of(head.log_probs(student), 3)[0]).abs().max() < 1e-12


def test_a_sure_teacher_gives_a_number() -> None:
    """What is left for the others may be no more than 0 in float32."""
    logits = torch.zeros(1, V)
    logits[0, 3] = 300
    top, unseen = top_of(logits.log_softmax(-1), 2)
    head = Head(torch.eye(V))
    kl = kept_kl(torch.zeros(1, V), head, Top(*top))
    assert kl.isfinite().all()
    assert unseen.isfinite().all()
    assert float(kl) == pytest.approx(float(torch.tensor(V).log()))
