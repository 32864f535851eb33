"""What SERAC is trained on: a balanced cross-entropy of scope, and, with the soft mixture, the mixture's own losses.

Q queries, N edits, n tokens, c tokens of one chunk, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modules.losses import CHUNK, Head

NEAREST = 1e-6  # two texts are never more alike than this says, so that log(1 - similarity) is a number


def scope_loss(log_similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced cross-entropy: of pairs in scope -log s, of pairs out of scope -log(1 - s); a sum of each.

    Args:
        log_similarity: log s [Q, N].
        positive, negative: the weight of each pair in either [Q, N]; those of an edit sum to 1, which balances them.
    """
    inside = -(positive * log_similarity).sum()
    outside = -(negative * torch.log(-torch.expm1(log_similarity.clamp(max=-NEAREST)))).sum()
    return inside, outside


def mix(similarity: Tensor, base: Tensor, counterfactual: Tensor) -> Tensor:
    """Log-probabilities of `(1 - s) p_base + s p_counterfactual` (released code; EasyEdit trains with nothing else).

    Args:
        similarity: s [n].
        base, counterfactual: logits [n, V] and [n, V']. Models of one tokenizer may pad their heads to different
            widths: both are cut to the columns that they share.
    """
    width = min(base.shape[1], counterfactual.shape[1])
    s = similarity.float().clamp(NEAREST, 1 - NEAREST)[:, None]
    left, right = (logits[:, :width].float().log_softmax(-1) for logits in (base, counterfactual))
    return torch.logaddexp(torch.log1p(-s) + left, s.log() + right)


def mixture_losses(
    similarity: Tensor,
    hidden: Tensor,
    head: Head,
    base_hidden: Tensor,
    base_head: Head,
    labels: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the mixture, and KL(base || mixture), of each token [n]. The base model gets no gradient.

    Args:
        similarity: s [n].
        hidden, base_hidden: last states of the counterfactual and the base model where the tokens are predicted [n, d].
        labels: the tokens [n].
        chunk: tokens whose logits exist at one time.
    """

    def losses(start: int) -> Tensor:
        rows = slice(start, start + chunk)
        with torch.no_grad():
            base = F.linear(base_hidden[rows], base_head.weight, base_head.bias)
        mixed = mix(similarity[rows], base, F.linear(hidden[rows], head.weight, head.bias))  # [c, V]
        ce = F.nll_loss(mixed, labels[rows], reduction="none")
        target = base[:, : mixed.shape[1]].float().log_softmax(-1)
        return torch.stack([ce, F.kl_div(mixed, target, reduction="none", log_target=True).sum(-1)])

    starts = range(0, max(len(labels), 1), chunk)
    remade = [checkpoint(losses, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    ce, kl = torch.cat(remade, dim=1)
    return ce, kl
