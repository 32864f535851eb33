"""One vector a row, encoded when first asked for, and the nearest rows to a query.

n rows, d width, Q queries.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Nearest(NamedTuple):
    """The nearest rows to a query, best first, and their cosines."""

    rows: list[int]
    cosines: list[float]


class Vectors:
    """A growing table of vectors of length 1.

    Attributes:
        known: which rows have a vector [n], bool.
    """

    def __init__(self, width: int) -> None:
        self._table = torch.empty(0, width)
        self.known = torch.zeros(0, dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.known)

    @property
    def table(self) -> Tensor:
        """[n, d]; what is not known is zero."""
        return self._table[: len(self)]

    def grow(self, count: int) -> None:
        """Rows without a vector at the end, so that there are `count`."""
        with torch.inference_mode(False):
            if count > len(self._table):
                larger = torch.zeros(max(count, 2 * len(self._table), 64), self._table.shape[1])
                larger[: len(self)] = self.table
                self._table = larger
            self.known = torch.cat([self.known, torch.zeros(count - len(self), dtype=torch.bool)])

    def put(self, rows: Sequence[int], vectors: Tensor) -> None:
        """Set the vectors [len(rows), d] of rows."""
        at = torch.tensor(rows, dtype=torch.long)
        self._table[at] = vectors.to(self._table)
        self.known[at] = True

    def forget(self, rows: Sequence[int]) -> None:
        at = torch.tensor(rows, dtype=torch.long)
        self._table[at] = 0
        self.known[at] = False

    def keep(self, rows: Sequence[int]) -> None:
        """Only these rows, in this order."""
        at = torch.tensor(rows, dtype=torch.long)
        with torch.inference_mode(False):
            self._table, self.known = self.table[at], self.known[at]

    def nearest(self, queries: Tensor, k: int) -> list[Nearest]:
        """Of each query [Q, d], the k nearest of all known rows; of equal ones the first comes first."""
        found: list[Nearest] = []
        for some in queries.split(max(1, 2**24 // max(len(self), 1))):  # never more than 64 MiB of cosines
            cosines = some @ self.table.T  # [some, n]
            if not bool(self.known.all()):
                cosines = cosines.masked_fill(~self.known, -torch.inf)
            found += [best(row, k) for row in cosines]
        return found


def best(cosines: Tensor, k: int) -> Nearest:
    """The k largest of [n], minus infinity left out; of equal ones the first comes first."""
    k = min(k, int((cosines > -torch.inf).sum()))
    if not k:
        return Nearest([], [])
    least = cosines.topk(k).values[-1]
    rows = (cosines >= least).nonzero()[:, 0]
    rows = rows[cosines[rows].sort(descending=True, stable=True).indices[:k]]
    return Nearest(rows.tolist(), cosines[rows].tolist())
