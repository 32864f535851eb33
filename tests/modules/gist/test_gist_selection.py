"""The published selection and our matcher, against their arithmetic written out plainly."""

import math

import pytest
import torch
from torch import Tensor

from modules.gist.matcher import GistMatcher, read
from modules.gist.pool import LayerGists
from modules.gist.selector import GistSelector

B, T, N, H, K, D = 2, 3, 4, 4, 2, 8


def case(zero_gist: bool = True) -> tuple[GistSelector, Tensor, LayerGists]:
    torch.manual_seed(0)
    selector = GistSelector(K, D, zero_gist)
    return selector, torch.randn(B, H, T, D), LayerGists(torch.randn(N, K, D), torch.randn(N, K, D))


def plainly(
    selector: GistSelector, query: Tensor, gists: LayerGists, visible: Tensor, scale: float, scope: Tensor
) -> tuple[Tensor, Tensor]:
    """One row, token and head at a time: the output [B, T, H, D] and the mean probabilities [B, T, N + 1]."""
    out, probabilities = torch.zeros(B, T, H, D), torch.zeros(B, T, N + 1)
    for b in range(B):
        for t in range(T):
            for h in range(H):
                k = h // (H // K)  # two query heads share a key head
                choices = [n for n in range(N) if visible[b, n]]
                logits = [float(query[b, h, t] @ gists.keys[n, k]) * scale + float(scope[b, t, n]) for n in choices]
                if selector.zero_gist:
                    logits.append(float(query[b, h, t] @ selector.zero_key[k]) * scale + float(scope[b, t, N]))
                total = sum(math.exp(x) for x in logits)
                for n, logit in zip([*choices, N], logits, strict=False):
                    p = math.exp(logit) / total
                    probabilities[b, t, n] += p / H
                    if n < N:  # the zero-gist's value is zero
                        out[b, t, h] += p * gists.values[n, k]
    return out, probabilities


@pytest.mark.parametrize("zero_gist", [True, False])
@pytest.mark.parametrize("visibility", ["all", "some"])
@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 0.45])
@torch.no_grad()
def test_selector_is_softmax_of_query_times_key(zero_gist, visibility, scaling, temperature) -> None:
    selector, query, gists = case(zero_gist)
    visible = (
        torch.ones(B, N, dtype=torch.bool) if visibility == "all" else torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    )
    given = None if visibility == "all" else visible
    scale = (scaling or 1 / math.sqrt(D)) / temperature
    expected, probabilities = plainly(selector, query, gists, visible, scale, torch.zeros(B, T, N + 1))
    fused, nothing = selector(query, gists, given, scaling, temperature)
    traced, logp = selector(query, gists, given, scaling, temperature, trace=True)
    assert nothing is None
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(traced, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp.exp(), probabilities, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_choices_of_single_heads() -> None:
    selector, query, gists = case()
    visible = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool()
    scope = torch.randn(B, T, N + 1)
    found = selector.log_probs(query, gists, visible, 0.7, 0.5, scope).exp()
    for b, h, t in ((0, 0, 1), (1, 3, 2), (1, 1, 0)):
        keys = torch.cat([gists.keys[:, h // (H // K)], selector.zero_key[None, h // (H // K)]])
        logits = keys @ query[b, h, t] * 0.7 / 0.5 + scope[b, t]
        seen = torch.cat([visible[b], torch.tensor([True])])
        torch.testing.assert_close(found[b, h, t], logits.masked_fill(~seen, -torch.inf).softmax(-1))
    mean = selector(query, gists, visible, 0.7, 0.5, scope, trace=True)[1].exp()
    torch.testing.assert_close(found.mean(1), mean)


@torch.no_grad()
def test_scope_is_added_to_the_logits() -> None:
    selector, query, gists = case()
    scope = torch.randn(B, T, N + 1).log_softmax(-1)
    scope[0, :, 2] = -1e9  # unseen by the matcher
    visible = torch.ones(B, N, dtype=torch.bool)
    expected, probabilities = plainly(selector, query, gists, visible, D**-0.5, scope)
    for trace in (False, True):
        out, logp = selector(query, gists, None, scope=scope, trace=trace)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logp.exp(), probabilities, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_one_gist_without_zero_gist_is_read_whole() -> None:
    selector, query, _ = case(zero_gist=False)
    gists = LayerGists(torch.randn(1, K, D), torch.randn(1, K, D))
    out, _ = selector(query, gists)
    torch.testing.assert_close(out, gists.values[0].repeat_interleave(H // K, dim=0).expand(B, T, H, D))


@torch.no_grad()
def test_a_zero_key_along_the_queries_takes_all() -> None:
    selector, query, gists = case()
    query = query.abs()
    selector.zero_key.fill_(1e6)
    for trace in (False, True):
        out, logp = selector(query, gists, trace=trace)
        assert out.abs().max() <= 1e-6
    torch.testing.assert_close(logp[..., -1].exp(), torch.ones(B, T))


def test_a_row_that_sees_nothing_reads_nothing_and_has_a_gradient() -> None:
    selector, query, gists = case()
    query.requires_grad_()
    visible = torch.tensor([[False] * N, [True] * N])
    for trace in (False, True):
        query.grad = None
        out, _ = selector(query, gists, visible, trace=trace)
        out.sum().backward()
        assert torch.equal(out[0], torch.zeros_like(out[0]))
        assert torch.isfinite(query.grad).all()


def test_selector_gradients_agree_between_paths() -> None:
    grads = []
    for trace in (False, True):
        selector, query, gists = case()
        gists = LayerGists(gists.keys.requires_grad_(), gists.values.requires_grad_())
        visible = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]]).bool()
        out, _ = selector(query, gists, visible, trace=trace)
        out.square().sum().backward()
        grads.append((gists.keys.grad, gists.values.grad, selector.zero_key.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_zero_key_is_trained_only_where_there_is_a_zero_gist() -> None:
    assert GistSelector(K, D).zero_key.requires_grad
    assert not GistSelector(K, D, zero_gist=False).zero_key.requires_grad


# ---------------------------------------------------------------------- the matcher


def matcher(**options) -> tuple[GistMatcher, Tensor, Tensor]:
    torch.manual_seed(0)
    made = GistMatcher(D, **options)
    with torch.no_grad():
        made.map += 0.3 * torch.randn(D, D)
        made.mean += 0.1 * torch.randn(D)
        made.emphasis += torch.randn(D)
    address = torch.nn.functional.normalize(torch.randn(N, D), dim=-1)
    return made, torch.randn(B, T, D), address


@pytest.mark.parametrize("zero_gist", [True, False])
@torch.no_grad()
def test_matcher_by_hand(zero_gist: bool) -> None:
    made, states, address = matcher(scale=5.0, threshold=0.2, zero_gist=zero_gist)
    visible = torch.tensor([[True, False, True, True], [True] * 4])
    logp, carried = made(states, torch.ones(B, T), address, visible)
    for b in range(B):
        best = [-1.0] * N
        for t in range(T):
            mapped = (states[b, t] - made.mean) @ made.map
            best = [max(x, float(mapped @ a / mapped.norm())) for x, a in zip(best, address, strict=True)]
            weights = [math.exp(5.0 * (x - 0.2)) * bool(v) for x, v in zip(best, visible[b], strict=True)]
            weights.append(1.0 if zero_gist else 0.0)
            expected = torch.tensor(weights) / sum(weights)
            torch.testing.assert_close(logp[b, t].exp(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(carried[b], torch.tensor(best), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_a_match_is_never_forgotten() -> None:
    made, _, address = matcher()
    states = torch.randn(B, 9, D)
    logp, _ = made(states, torch.ones(B, 9), address)
    against_zero = logp[..., :-1] - logp[..., -1:]
    assert (against_zero.diff(dim=1) >= -1e-5).all()
    assert (against_zero.diff(dim=1) > 1e-3).any()


@torch.no_grad()
def test_carried_state_equals_the_whole_pass_and_padding_never_matches() -> None:
    made, _, address = matcher()
    states = torch.randn(B, 6, D)
    whole, last = made(states, torch.ones(B, 6), address)
    first, carried = made(states[:, :2], torch.ones(B, 2), address)
    parts = [first]
    for t in range(2, 6):
        step, carried = made(states[:, t : t + 1], torch.ones(B, 1), address, None, carried)
        parts.append(step)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(carried, last)
    padded = torch.cat([10 * address[None, :1].expand(B, -1, -1), states], dim=1)  # padding that would match edit 0
    mask = torch.tensor([[0] + [1] * 6] * B)
    torch.testing.assert_close(made(padded, mask, address)[0][:, 1:], whole)


@torch.no_grad()
def test_addresses_by_hand() -> None:
    made, states, _ = matcher()
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found, _ = made(states, mask)
    for b, n in enumerate((2, 3)):
        mapped = (states[b, :n] - made.mean) @ made.map
        mean = (mapped @ made.emphasis).softmax(0) @ mapped
        torch.testing.assert_close(found[b], mean / mean.norm(), atol=1e-6, rtol=1e-5)
    made.emphasis.zero_()  # where it starts: every token counts alike
    found, _ = made(states, mask)
    mean = ((states[0, :2] - made.mean) @ made.map).mean(0)
    torch.testing.assert_close(found[0], mean / mean.norm(), atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_whitened_states_have_unit_covariance() -> None:
    torch.manual_seed(0)
    made = GistMatcher(D)
    states = torch.randn(5000, D) @ torch.randn(D, D) + 3
    made.whiten(states, ridge=0.0)
    mapped = (states - made.mean) @ made.map
    torch.testing.assert_close(mapped.mean(0), torch.zeros(D), atol=1e-3, rtol=0)
    torch.testing.assert_close(mapped.T @ mapped / len(mapped), torch.eye(D), atol=2e-3, rtol=0)
    silent = states.clone()
    silent[:, 0] = 1.0  # a direction without variance must not blow up
    made.whiten(silent)
    assert torch.isfinite(made.map).all()
    assert ((silent - made.mean) @ made.map).abs().max() < 100


@torch.no_grad()
def test_read_is_the_probability_weighted_sum_of_values() -> None:
    torch.manual_seed(0)
    logp, values = torch.randn(B, T, N + 1).log_softmax(-1), torch.randn(N, K, D)
    out = read(logp, values, H)
    for h in range(H):
        expected = torch.einsum("btn,nd->btd", logp.exp()[..., :N], values[:, h // (H // K)])
        torch.testing.assert_close(out[:, :, h], expected, atol=1e-6, rtol=1e-5)
