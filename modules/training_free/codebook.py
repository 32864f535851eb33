"""GRACE's codebook: keys, the balls about them, and how an edit finds its place (arXiv 2211.11031, algorithm 1).

B queries, K keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modules.backbone import Backbone


def rounding(dtype: torch.dtype) -> float:
    """The share of a query's length by which the same prompt may differ from batch to batch in a model of this type."""
    return max(1e-4, 2 * torch.finfo(dtype).eps)


def rounded(backbone: Backbone) -> float:
    """`rounding` of a model, as its weights are."""
    return rounding(next(backbone.model.parameters()).dtype)


@dataclass(frozen=True)
class Codebook:
    """Keys with their values, and the ball about each in which it answers.

    Args:
        keys: [K, d_in].
        values: [K, d_out].
        epsilons: radii [K]; negative: a key that answers no more.
        labels: the target's tokens of each key.
        key_of: the key that answers for each edit.
    """

    keys: Tensor
    values: Tensor
    epsilons: Tensor
    labels: tuple[tuple[int, ...], ...] = ()
    key_of: tuple[int, ...] = ()

    def nearest(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Of queries [B, d_in]: the key each is nearest to [B], and how far from it [B]."""
        # not by a product of matrices, whose rounding would put an edit's own query outside a small ball
        far = torch.cdist(query.to(self.keys), self.keys, compute_mode="donot_use_mm_for_euclid_dist")
        distance, key = far.masked_fill(self.epsilons < 0, torch.inf).min(1)
        return key, distance

    def place(self, key: Tensor, label: tuple[int, ...], epsilon: float, same: float = 1e-4) -> tuple["Codebook", bool]:
        """Make room for an edit whose query is `key` [d_in] (the paper's algorithm 1).

        Far from all keys: a new one. Near one of the same label: that one's ball grows to take it in. Near one of
        another label: a new key, and the balls of both end half way. At one of another label, which is the same
        question answered anew: a new key takes the old one's place, since no ball could tell them apart.

        Args:
            same: keys no farther apart than this share of their length are one (`rounding`).

        Returns:
            The codebook, and whether it has a new key, whose value is yet to be found.
        """
        if len(self.keys):
            index, distance = (x[0] for x in self.nearest(key[None]))
            at, d = int(index), float(distance)
            if d <= epsilon + float(self.epsilons[at]):
                if self.labels[at] == label:
                    grown = self.epsilons.clone()
                    # at the very edge it would fall outside in a batch of another shape
                    grown[at] = max(d + same * float(key.norm()), float(grown[at]))
                    return replace(self, epsilons=grown, key_of=(*self.key_of, at)), False
                shrunk = self.epsilons.clone()
                if d <= same * float(key.norm()):
                    epsilon, shrunk[at] = float(shrunk[at]), -1
                else:
                    shrunk[at] = epsilon = d / 2
                return replace(self, epsilons=shrunk)._with(key, label, epsilon), True
        return self._with(key, label, epsilon), True

    def _with(self, key: Tensor, label: tuple[int, ...], epsilon: float) -> "Codebook":
        return Codebook(
            torch.cat([self.keys, key[None].to(self.keys)]),
            torch.cat([self.values, self.values.new_zeros(1, self.values.shape[1])]),
            torch.cat([self.epsilons, self.epsilons.new_tensor([epsilon])]),
            (*self.labels, label),
            (*self.key_of, len(self.keys)),
        )

    def keep(self, edits: Sequence[int]) -> "Codebook":
        """Only the keys that answer for these edits; balls stay as they have become."""
        used = sorted({self.key_of[i] for i in edits})
        number = {key: i for i, key in enumerate(used)}
        labels = tuple(self.labels[key] for key in used)
        of = tuple(number[self.key_of[i]] for i in edits)
        return Codebook(self.keys[used], self.values[used], self.epsilons[used], labels, of)
