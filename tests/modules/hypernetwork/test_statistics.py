"""Running statistics against numpy's over all tokens together."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modules.hypernetwork.statistics import EPSILON, RunningStatistics

TOKENS = torch.randn(57, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-5, 1.0, 3.0, 1e3, 1.0, 0.1])
TOKENS += torch.tensor([0.0, 100.0, -3.0, 0.0, 1.0, 5.0])


def after(parts: Sequence[Tensor], commits: Sequence[int]) -> RunningStatistics:
    """Statistics after these parts were observed, with a commit after those numbered so."""
    statistics = RunningStatistics(6)
    for i, part in enumerate(parts):
        statistics.observe(part)
        if i in commits:
            statistics.commit()
    return statistics


@pytest.mark.parametrize("sizes", [[57], [1] * 57, [20, 37], [2, 0, 55], [30, 1, 1, 25]])
@pytest.mark.parametrize("every", [1, 3, 100])
def test_any_split_gives_numpys_mean_and_deviation(sizes: list[int], every: int) -> None:
    last = len(sizes) - 1
    statistics = after(TOKENS.split(sizes), [i for i in range(len(sizes)) if i % every == 0 or i == last])
    whole = TOKENS.double().numpy()
    assert statistics.count == 57
    np.testing.assert_allclose(statistics.mean.numpy(), whole.mean(0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(statistics.std.numpy(), whole.std(0, ddof=1), rtol=1e-9)
    expected = (whole - whole.mean(0)) / (whole.std(0, ddof=1) + EPSILON)
    np.testing.assert_allclose(statistics.normalise(TOKENS).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_nothing_counts_before_the_commit() -> None:
    statistics = after([TOKENS], [])
    assert torch.equal(statistics.normalise(TOKENS), TOKENS / (1 + EPSILON))
    statistics.commit()
    assert statistics.count == 57
    statistics.commit()
    assert statistics.count == 57


def test_tokens_that_are_not_finite_never_count() -> None:
    bad = TOKENS.clone()
    bad[3, 2], bad[9, 0] = torch.inf, torch.nan
    found = after([bad], [0])
    expected = after([TOKENS[[i for i in range(57) if i not in (3, 9)]]], [0])
    for name, value in expected.named_buffers():
        torch.testing.assert_close(dict(found.named_buffers())[name], value, rtol=1e-12, atol=0)


def test_casts_leave_double_precision() -> None:
    statistics = after([TOKENS], [0])
    before = [b.clone() for b in statistics.buffers()]
    torch.nn.Sequential(statistics, torch.nn.Linear(2, 2)).bfloat16().float()
    assert all(
        torch.equal(a, b) and b.dtype == torch.float64 for a, b in zip(before, statistics.buffers(), strict=True)
    )


def test_ranks_take_in_what_each_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other rank sends is added to this one's; where all observed the same, nothing is sent."""
    other = after([TOKENS[30:]], [])
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(other._observed))
    mine = after([TOKENS[:30]], [0])
    np.testing.assert_allclose(mine.std.numpy(), TOKENS.double().numpy().std(0, ddof=1), rtol=1e-9)
    alone = RunningStatistics(6)
    alone.observe(TOKENS[:30])
    alone.commit(ranks=False)
    assert alone.count == 30
