"""The divergence of the student from what was kept of the teacher, token by token.

n tokens, c tokens of one chunk, d hidden, V vocabulary, k kept tokens.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.losses import CHUNK, Head, token_kl


class Full(NamedTuple):
    """Whole distributions: the teacher's last hidden states [n, d], of which the frozen head makes them again."""

    hidden: Tensor


class Top(NamedTuple):
    """Distributions in part.

    Args:
        log_probs, tokens: of the k most probable tokens [n, k].
        rest: log-probability of all others together [n].
    """

    log_probs: Tensor
    tokens: Tensor
    rest: Tensor


Taught = Full | Top


def kept_kl(h: Tensor, head: Head, taught: Taught, chunk: int = CHUNK) -> Tensor:
    """KL(teacher || student) at each token: the student's last hidden states `h [n, d]` -> `[n]` (paper, eq. 2).

    Of a `Top` it is the divergence over k + 1 outcomes, the others being one: never more than the whole, and less by
    `rest` times the divergence among the others. With k = V there are none, and nothing is missing.

    Args:
        head: of the student, and of the teacher: it is frozen.
        chunk: tokens whose logits exist at one time.
    """
    if isinstance(taught, Full):
        return token_kl(h, head, taught.hidden.to(h), head, chunk)

    def one(start: int) -> Tensor:
        rows = slice(start, start + chunk)
        p, tokens, rest = (t[rows] for t in taught)
        q = head.log_probs(h[rows])  # [c, V]
        kl = (p.exp() * (p - q.gather(1, tokens))).sum(-1)
        if tokens.shape[1] < q.shape[1]:
            kl = kl + rest.exp() * (rest - _others(q, tokens).logsumexp(-1))
        return kl

    starts = range(0, max(len(h), 1), chunk)
    if len(starts) == 1 or not torch.is_grad_enabled():
        return torch.cat([one(start) for start in starts])
    return torch.cat([checkpoint(one, start, use_reentrant=False, preserve_rng_state=False) for start in starts])


def top_of(logp: Tensor, k: int) -> tuple[Top, Tensor]:
    """The k most probable tokens of distributions [c, V], and what a loss on them cannot see [c], in nats.

    That is `rest` times the divergence of the others from evenly spread ones: the error of `kept_kl` for a student that
    knows nothing about them.
    """
    found = logp.topk(min(k, logp.shape[1]))
    others = _others(logp, found.indices)
    rest = others.logsumexp(-1)  # -inf where all are kept
    count = logp.shape[1] - found.indices.shape[1]
    if not count:
        return Top(found.values, found.indices, rest), torch.zeros_like(rest)
    within = others - rest[:, None]
    entropy = -torch.where(within.isinf(), 0, within.exp() * within).sum(-1)
    unseen = rest.exp() * (torch.tensor(count).log() - entropy).clamp(min=0)
    return Top(found.values, found.indices, rest), unseen


def _others(logp: Tensor, tokens: Tensor) -> Tensor:
    return logp.scatter(1, tokens, -torch.inf)
