"""Terms of pools of edits, each of which many queries are asked of.

P pools, B rows, T tokens, r rank.
"""

import torch
from torch import Tensor

from modules.interventions import LowRank


class Pooled:
    """What the edits of every row's pool add to a linear layer's output.

    Rows of one pool are laid side by side, so that none has a copy of the pool's factors: with many edits these are far
    more numbers than the rows.

    Args:
        term: of each pool, of P rows [P, r, d].
        pool: of each row of a batch [B].
    """

    def __init__(self, term: LowRank, pool: Tensor) -> None:
        self.term, self.pool = term, pool
        sizes = pool.bincount(minlength=len(term.a))
        self.most = int(sizes.max())
        order = pool.argsort(stable=True)
        self.place = torch.empty_like(pool)  # among the rows of its pool
        self.place[order] = torch.arange(len(pool), device=pool.device) - (sizes.cumsum(0) - sizes)[pool[order]]

    def __call__(self, x: Tensor) -> Tensor:
        """x [B, T, d_in] -> [B, T, d_out], in the factors' precision."""
        at = self.pool, self.place
        rows = x.new_zeros(len(self.term.a), self.most, *x.shape[1:]).index_put(at, x)  # [P, most, T, d_in]
        return self.term(rows.flatten(1, 2)).unflatten(1, rows.shape[1:3])[at]
