"""Running mean and variance of vectors, the same however the vectors are split over batches, steps and ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

EPSILON = 1e-7  # as released with MEND


class RunningStatistics(nn.Module):
    """Mean and variance of each feature over all tokens ever observed, in double precision.

    Tokens that are observed count from the next `commit` on, which is to come at the end of an optimizer step, on all
    ranks: within a step every micro-batch is normalised alike, wherever it is computed. Batches are merged by Chan's
    formula, over ranks too.

    Args:
        width: features.
    """

    count: Tensor
    mean: Tensor
    squares: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(width, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(width, dtype=torch.float64))  # of deviations from the mean
        self._observed: Tensor | None = None  # count, sum, sum of squares about `mean` [1 + 2 width]

    @property
    def std(self) -> Tensor:
        """Standard deviation of each feature [width]; 1 before there are two tokens."""
        std = (self.squares / (self.count - 1).clamp(min=1)).sqrt()
        return torch.where(self.count < 2, torch.ones_like(std), std)

    def normalise(self, x: Tensor) -> Tensor:
        """x [n, width] in units of the deviations from the mean."""
        return (x - self.mean.to(x.dtype)) / (self.std + EPSILON).to(x.dtype)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let tokens x [n, width] count from the next commit on; one that is not finite never does."""
        about = x.double() - self.mean
        about = about[about.isfinite().all(1)]
        found = torch.cat([about.new_tensor([len(about)]), about.sum(0), about.square().sum(0)])
        self._observed = found if self._observed is None else self._observed + found

    @torch.no_grad()
    def commit(self, ranks: bool = True) -> None:
        """Take in what was observed.

        Args:
            ranks: on all ranks together; False where every rank has observed the same.
        """
        found = torch.zeros_like(self.mean).repeat(2) if self._observed is None else self._observed[1:]
        count = torch.zeros_like(self.count) if self._observed is None else self._observed[0]
        found = torch.cat([count[None], found])
        self._observed = None
        if ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found)
        count, (total, squares) = found[0], found[1:].chunk(2)
        after = self.count + count
        shift = total / after.clamp(min=1)
        self.squares += squares - total * shift
        self.squares.clamp_(min=0)
        self.mean += shift
        self.count.copy_(after)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """To another device, but never to a precision in which a count would stop growing."""
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            assert buffer is not None
            self._buffers[name] = buffer.to(self._buffers[name].device)  # type: ignore[union-attr]
        return self
