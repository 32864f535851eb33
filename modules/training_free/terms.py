"""Changes of weights that are tuned: dense, or in low-rank factors; held apart from the weights.

G changes (1, or one of each row), B rows, T tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.interventions import LowRank


@dataclass(frozen=True)
class Dense:
    """What is added to a linear layer's output: `x D`.

    Args:
        d: [G, d_in, d_out]; G = 1: one change for all rows.
    """

    d: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in] of as many rows, or of any number where G = 1 -> [..., d_out], in the change's precision."""
        if len(self.d) not in (1, len(x)):
            raise ValueError(f"a change of {len(self.d)} rows met a batch of {len(x)}")
        with torch.autocast(x.device.type, enabled=False):
            return x.to(self.d.dtype) @ (self.d[0] if len(self.d) == 1 else self.d)


Term = Dense | LowRank


def together(first: Term, then: Term) -> Term:
    """The sum of two terms of one kind."""
    if isinstance(first, Dense) and isinstance(then, Dense):
        return Dense(first.d + then.d)
    if isinstance(first, LowRank) and isinstance(then, LowRank):
        return LowRank(torch.cat([first.a, then.a], 1), torch.cat([first.b, then.b], 1)).compact()
    raise TypeError(f"cannot add a {type(then).__name__} to a {type(first).__name__}")


def row_of(term: Term, i: int) -> Term:
    """The change of edit i alone, in memory of its own."""
    if isinstance(term, Dense):
        return Dense(term.d[i : i + 1].clone())
    return LowRank(term.a[i : i + 1].clone(), term.b[i : i + 1].clone())


def detached(term: Term) -> Term:
    """Without gradient."""
    return Dense(term.d.detach()) if isinstance(term, Dense) else LowRank(term.a.detach(), term.b.detach())


def shape_of(term: Term) -> tuple[int, int]:
    """(d_in, d_out)."""
    if isinstance(term, Dense):
        return term.d.shape[1], term.d.shape[2]
    return term.a.shape[2], term.b.shape[2]
