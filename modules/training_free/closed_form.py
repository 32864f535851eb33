"""The one linear system behind ROME, MEMIT, EMMET, PMET, AlphaEdit and COMEBA-HK.

Keys k_i (inputs of a layer at the subjects) shall give r_i more than they do, and all other inputs as little as can be:

    minimise over D   sum_i |D k_i - r_i|^2 + weight * tr(D M^-1 D')
    D = R (weight I + K' M K)^-1 K' M = sum_i r_i a_i'

The metric M says what "other inputs" are:

    M = C^-1, C = E[k k']     ROME (weight 0, one edit), EMMET (weight alpha), MEMIT and COMEBA-HK (weight lambda)
    M = I                     ROME without second moments (EasyEdit's setting)
    M = P                     AlphaEdit: P projects on directions that other inputs hardly use, weight L2

By the push-through identity this is R K' (weight C + K K')^-1 of MEMIT, and P K R' of AlphaEdit's normal equations.
Keys that must keep what they give (COMEBA-HK, AlphaEdit: all earlier edits) are columns of K with r = 0. The factors a
[n, d_in] and r [n, d_out] are those of `interventions.Deltas`: no weight is ever written to, or made.

That system is as large as there are keys. With more of them than the layer has inputs the same D is R K' (weight I +
M K K')^-1 M, whose system is [f, f].

n new and m earlier edits, f = d_in.
"""

from typing import Protocol

import torch
from torch import Tensor


class Metric(Protocol):
    """A symmetric matrix M [f, f], without negative eigenvalues, known by what it does to vectors."""

    def __call__(self, keys: Tensor) -> Tensor:
        """[n, f] -> [n, f] in float64: M k of each."""
        ...


class Identity:
    """M = I."""

    def __call__(self, keys: Tensor) -> Tensor:
        return keys.double()


class Inverse:
    """M = C^-1 of second moments [f, f], by a Cholesky factor in float64.

    Moments of few tokens, or such as float32 rounds, may have eigenvalues at or just below 0. As much of the mean
    eigenvalue is then added to the diagonal as is needed, 1e-12 at first and 1e-4 at most.

    Raises:
        ValueError: where that is not enough.
    """

    def __init__(self, moments: Tensor, name: str = "") -> None:
        wide = moments.to(torch.float64, copy=True)
        diagonal = wide.diagonal().clone()
        mean = float(diagonal.mean())
        for exponent in (None, *range(-12, -3)):
            ridge = 0.0 if exponent is None else 10.0**exponent * mean
            wide.diagonal().copy_(diagonal + ridge)
            self.factor, failed = torch.linalg.cholesky_ex(wide)
            if not bool(failed) and mean > 0:
                return
        raise ValueError(
            f"the second moments{f' of {name}' if name else ''} are not positive definite; count more tokens "
            f"(moments.tokens), several times the {len(wide)} inputs of the layer"
        )

    def __call__(self, keys: Tensor) -> Tensor:
        return torch.cholesky_solve(keys.double().T, self.factor).T


class Projection:
    """M = I - B B' for an orthonormal basis B [f, r] of the directions that must stay as they are."""

    def __init__(self, basis: Tensor) -> None:
        self.basis = basis.double()

    @property
    def rank(self) -> int:
        """How many directions it leaves."""
        return self.basis.shape[0] - self.basis.shape[1]

    def __call__(self, keys: Tensor) -> Tensor:
        keys = keys.double()
        return keys - (keys @ self.basis) @ self.basis.T


def leverage(metric: Metric, keys: Tensor) -> Tensor:
    """k' M k of each key [n]. With M = C^-1 its mean over the inputs that C was taken of is exactly f: it has no unit,
    and says by how much a key stands out."""
    return (keys.double() * metric(keys)).sum(-1)


def automatic_weight(width: int) -> float:
    """A weight of second moments that fits any model: f, the mean leverage of a layer's inputs.

    A single edit is inserted to the share g / (weight + g), g its key's leverage: a key that stands out no more than
    the average input is changed by half of what it should. Published weights are f, or some three times more or less:
    20,000 at f = 6,400 (GPT2-XL), 15,000 at 16,384 (GPT-J), at 14,336 (Llama-3-8B) and at 18,944 (Qwen2.5-7B).
    """
    return float(width)


def solve(metric: Metric, keys: Tensor, weight: float, earlier: Tensor | None = None) -> Tensor:
    """The input factors a [n, f] of new edits, in float64.

    Args:
        keys: of the new edits [n, f].
        weight: of other inputs; 0: keys give exactly what they should (constrained least squares).
        earlier: keys [m, f] that shall go on to give what they give now.

    Raises:
        ValueError: with weight 0, where keys depend on one another.
    """
    every = keys if earlier is None else torch.cat([earlier.to(keys), keys])  # [m + n, f]
    if weight and len(every) > every.shape[1]:
        wide = every.double()
        inputs = metric(wide.T @ wide)  # (M K K')', [f, f]
        inputs.diagonal().add_(weight)
        return metric(torch.linalg.solve(inputs, keys.double().T).T)
    moved = metric(every)  # M k
    system = every.double() @ moved.T  # K' M K
    system = (system + system.T) / 2
    system.diagonal().add_(weight)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):
        raise ValueError(
            f"{len(every)} keys depend on one another, so that not all edits can be exact; give the edits a weight "
            f"above {weight}"
        )
    columns = torch.eye(len(every), dtype=system.dtype, device=system.device)[:, -len(keys) :]  # the new ones
    return torch.cholesky_solve(columns, factor).T @ moved
