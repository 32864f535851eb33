"""Closed forms against numpy: constrained least squares, ridge, projections; and what they have in common."""

import numpy as np
import pytest
import torch

from modules.training_free.closed_form import (
    Identity,
    Inverse,
    Projection,
    automatic_weight,
    leverage,
    solve,
)
from modules.training_free.rome import rank_one

F, D, N = 12, 5, 4
DRAW = np.random.default_rng(3)
INPUTS = DRAW.standard_normal((200, F)) @ DRAW.standard_normal((F, F))
C = INPUTS.T @ INPUTS / len(INPUTS)
K, R = DRAW.standard_normal((F, N)), DRAW.standard_normal((D, N))  # columns, as the papers write them
OLD = DRAW.standard_normal((F, 3))


def delta(a: torch.Tensor, residual: np.ndarray = R) -> np.ndarray:
    """The change of W [D, F] that input factors a [n, F] and residuals make."""
    return residual @ a.numpy()


def rows(columns: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(columns.T.copy())


def test_ridge_is_memits_normal_equations() -> None:
    for weight in (0.3, 20.0):
        expected = R @ K.T @ np.linalg.inv(weight * C + K @ K.T)
        np.testing.assert_allclose(delta(solve(Inverse(torch.from_numpy(C)), rows(K), weight)), expected, rtol=1e-8)


def test_an_infinite_weight_allows_no_change() -> None:
    norms = [np.abs(delta(solve(Inverse(torch.from_numpy(C)), rows(K), w))).max() for w in (1.0, 1e6, 1e12)]
    assert norms[0] > 0.01
    assert norms[1] < 1e-2 * norms[0]
    assert norms[2] < 1e-8 * norms[0]


def test_no_weight_is_constrained_least_squares() -> None:
    """min tr(D C D') subject to D K = R, by its KKT system."""
    system = np.block([[2 * C, K], [K.T, np.zeros((N, N))]])
    found = np.linalg.solve(system, np.vstack([np.zeros((F, D)), R.T]))[:F].T
    np.testing.assert_allclose(delta(solve(Inverse(torch.from_numpy(C)), rows(K), 0.0)), found, rtol=1e-7)


def test_rank_one_changes_in_turn_are_exact_where_no_later_one_touches_them() -> None:
    """One edit: ROME's constrained least squares. Several: the last is exact, and each is of rank one."""
    metric = Inverse(torch.from_numpy(C))
    a, b = rank_one(metric, rows(K[:, :1]), rows(K[:, :1]), rows(R[:, :1]))
    k = K[:, 0]
    u = np.linalg.solve(C, k)
    np.testing.assert_allclose((b.T @ a).numpy(), np.outer(R[:, 0], u) / (u @ k), rtol=1e-8)
    a, b = rank_one(metric, rows(K), rows(K), rows(R))
    np.testing.assert_allclose((b.T @ a).numpy() @ K[:, -1], R[:, -1], rtol=1e-8)
    weight = np.zeros((D, F))
    for i in range(N):  # each at the weight that those before it left
        u = np.linalg.solve(C, K[:, i])
        weight += np.outer(R[:, i] - weight @ K[:, i], u) / (u @ K[:, i])
    np.testing.assert_allclose((b.T @ a).numpy(), weight, rtol=1e-7, atol=1e-9)


def test_the_released_rome_takes_its_size_from_another_key() -> None:
    metric = Inverse(torch.from_numpy(C))
    mean, bare = K[:, 0], K[:, 1]
    a, b = rank_one(metric, rows(K[:, :1]), rows(K[:, 1:2]), rows(R[:, :1]))
    u = np.linalg.solve(C, mean)
    np.testing.assert_allclose((b.T @ a).numpy(), np.outer(R[:, 0], u) / (u @ bare), rtol=1e-8)
    np.testing.assert_allclose((b.T @ a).numpy() @ bare, R[:, 0], rtol=1e-8)


def test_projected_ridge_is_alphaedits_normal_equations() -> None:
    values, vectors = np.linalg.eigh(C)
    limit = np.median(values)
    projection = vectors[:, values < limit] @ vectors[:, values < limit].T
    metric = Projection(torch.from_numpy(vectors[:, values >= limit].copy()))
    l2 = 0.7
    expected = np.linalg.solve(projection @ (K @ K.T + OLD @ OLD.T) + l2 * np.eye(F), projection @ K @ R.T).T
    found = delta(solve(metric, rows(K), l2, rows(OLD)))
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found @ vectors[:, values >= limit], 0, atol=1e-10)  # other inputs give what they gave


@pytest.mark.parametrize("old", [0, 30])
def test_more_keys_than_inputs_take_a_system_of_the_inputs(old: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits on top of thousands of others, or thousands at once."""
    vectors = np.linalg.eigh(C)[1]
    free = vectors[:, : F // 2] @ vectors[:, : F // 2].T
    metrics = Inverse(torch.from_numpy(C)), Projection(torch.from_numpy(vectors[:, F // 2 :].copy())), Identity()
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)  # of a system of the keys
    keys = DRAW.standard_normal((F, old + 20))
    residual = np.hstack([np.zeros((D, old)), DRAW.standard_normal((D, 20))])
    for metric, m in zip(metrics, (np.linalg.inv(C), free, np.eye(F)), strict=True):
        expected = residual @ np.linalg.inv(2.0 * np.eye(len(keys.T)) + keys.T @ m @ keys) @ keys.T @ m
        found = solve(metric, rows(keys[:, old:]), 2.0, rows(keys[:, :old]) if old else None)
        np.testing.assert_allclose(delta(found, residual[:, old:]), expected, rtol=1e-8, atol=1e-11)


def test_accumulated_batches_are_one_solve_over_all_edits() -> None:
    """COMEBA-HK: what each batch adds, with the keys of earlier ones remembered and residuals at the weight so far, is
    one ridge regression over all of them (eq. 13 against eq. 9)."""
    metric, weight = Inverse(torch.from_numpy(C)), 2.0
    w0 = DRAW.standard_normal((D, F))
    keys, values = np.hstack([OLD, K]), DRAW.standard_normal((D, OLD.shape[1] + N))
    w = w0 + delta(solve(metric, rows(OLD), weight), values[:, :3] - w0 @ OLD)
    w = w + delta(solve(metric, rows(K), weight, rows(OLD)), values[:, 3:] - w @ K)
    at_once = (weight * w0 @ C + values @ keys.T) @ np.linalg.inv(weight * C + keys @ keys.T)
    np.testing.assert_allclose(w, at_once, rtol=1e-7)
    forgetful = w0 + delta(solve(metric, rows(OLD), weight), values[:, :3] - w0 @ OLD)
    forgetful = forgetful + delta(solve(metric, rows(K), weight), values[:, 3:] - forgetful @ K)
    assert np.abs(forgetful - at_once).max() > 0.01


def test_one_edit_is_inserted_to_the_share_that_its_leverage_gives() -> None:
    metric = Inverse(torch.from_numpy(C))
    k = rows(K[:, :1])
    g = float(leverage(metric, k)[0])
    share = float(solve(metric, k, 3.0)[0] @ k[0])
    assert share == pytest.approx(g / (3.0 + g))
    # no unit: the same at any scale of the inputs
    scaled = Inverse(torch.from_numpy(49 * C))
    torch.testing.assert_close(leverage(scaled, 7 * k), leverage(metric, k))
    assert float(leverage(metric, torch.from_numpy(INPUTS)).mean()) == pytest.approx(automatic_weight(F))


def test_moments_of_too_few_tokens() -> None:
    few = torch.from_numpy(INPUTS[:6])
    rounded = Inverse((few.T @ few / 6).float())  # of rank 6: a little is added to the diagonal
    assert torch.isfinite(rounded(rows(K))).all()
    with pytest.raises(ValueError, match="second moments of mlp are not positive definite; count more tokens"):
        Inverse(torch.zeros(3, 3), "mlp")


def test_keys_that_depend_on_one_another_cannot_all_be_exact() -> None:
    twice = torch.cat([rows(K), rows(K)[:1]])
    with pytest.raises(ValueError, match="depend on one another"):
        solve(Identity(), torch.zeros(2, F), 0.0)
    assert torch.isfinite(solve(Identity(), twice, 0.1)).all()
