"""The sum of many edits of one linear layer: earlier ones as a matrix, the last ones as factors.

r rank, n tokens of several edits side by side.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from modules.interventions import Deltas, LowRank


@dataclass(frozen=True)
class Summed:
    """What edits add to a linear layer's output, for all rows of a batch: `x W + (x aᵀ) b`.

    Edits are added up in their order. Once the factors would be more numbers than the matrix they stand for, they are
    multiplied out. When that is depends on the edits alone, and not on how many are added at one time: the same edits
    are the same sum, and one more costs the same however many there are.

    Args:
        a: of the last edits [r, d_in].
        b: the same [r, d_out].
        whole: of all before them [d_in, d_out]; None where there are none.
    """

    a: Tensor
    b: Tensor
    whole: Tensor | None = None

    @classmethod
    def of(cls, deltas: Deltas) -> Self:
        """The sum of some edits."""
        return cls(deltas.a[:0], deltas.b[:0]).then(deltas)

    def then(self, more: Deltas) -> Self:
        """The sum of these edits and more of them."""
        order = more.edit.argsort(stable=True)
        a, b = torch.cat([self.a, more.a[order]]), torch.cat([self.b, more.b[order]])
        most = a.shape[1] * b.shape[1] // (a.shape[1] + b.shape[1])
        whole, first, end = self.whole, 0, len(self.a)
        for tokens in more.edit.bincount().tolist():
            end += tokens
            if end - first > most:
                part = _product(a[first:end], b[first:end])
                whole = part if whole is None else whole + part
                first = end
        if first:  # else a view of them would keep all factors
            a, b = a[first:].clone(), b[first:].clone()
        return type(self)(a, b, whole)

    def flat(self) -> Self:
        """The same without factors beside a matrix, for a sum that stays as it is."""
        return self if self.whole is None else type(self)(self.a[:0], self.b[:0], self.weight()[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(d_in, d_out)."""
        return self.a.shape[1], self.b.shape[1]

    def to(self, device: torch.device) -> Self:
        """The same sum on a device."""
        return type(self)(*(None if t is None else t.to(device) for t in (self.a, self.b, self.whole)))  # type: ignore[arg-type]

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in] -> [..., d_out], in the edits' precision."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.a.dtype)
            if self.whole is None:
                return (x @ self.a.T) @ self.b
            return x @ self.whole + (x @ self.a.T) @ self.b if len(self.a) else x @ self.whole

    def weight(self) -> Tensor:
        """The change of the weight, [1, d_in, d_out] as that of a term of one row."""
        part = _product(self.a, self.b)
        return (part if self.whole is None else self.whole + part)[None]

    def change(self) -> LowRank | Tensor:
        """The same as `Edited.weight_changes` has it: factors where there are no others, else the matrix."""
        return LowRank(self.a[None], self.b[None]) if self.whole is None else self.weight()[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    with torch.autocast(a.device.type, enabled=False):
        return a.T @ b
