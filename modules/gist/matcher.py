"""Selection of our own: which edit does the text speak of? Asked once, low in the model, for all active layers.

The published selection must learn from scratch that a layer's queries find the right gist among many; with the samples
of a laptop it does not ("What was tried" in RESULTS.md). But a low layer's state at a token still says which word
stands there, and in which company, and two texts about one subject have such a token in common. So an edit's address is
the mean of its tokens' whitened states, and a token matches an edit by their cosine. Untrained, on CounterFact, the
best match over a rephrased prompt's tokens is the right one of 100 edits in 95% of the cases; training sharpens it.

A match is carried: a token reads what it or any token before it in its row matched best. So the answer's tokens read
the edit whose subject was named earlier, and text that names no edited subject reads nothing.

B rows, T tokens, N gists, d hidden width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gist.selector import HIDDEN


class GistMatcher(nn.Module):
    """Addresses of edits, and each token's choice among them and the zero-gist.

    Args:
        hidden_size: d.
        scale: factor on the cosine.
        threshold: the cosine at which an edit is as likely as the zero-gist.
        zero_gist: offer the zero-gist.
    """

    mean: Tensor

    def __init__(self, hidden_size: int, scale: float = 30.0, threshold: float = 0.38, zero_gist: bool = True) -> None:
        super().__init__()
        self.zero_gist = zero_gist
        self.register_buffer("mean", torch.zeros(hidden_size))
        self.map = nn.Parameter(torch.eye(hidden_size))
        self.emphasis = nn.Parameter(torch.zeros(hidden_size))  # which of an edit's tokens make its address
        # of one element, not scalars: DeepSpeed broadcasts parameters as bytes, which a scalar has no view of
        self.log_scale = nn.Parameter(torch.tensor([math.log(scale)]))
        self.threshold = nn.Parameter(torch.tensor([threshold]), requires_grad=zero_gist)

    @torch.no_grad()
    def whiten(self, states: Tensor, ridge: float = 0.03) -> None:
        """Set the mean and the map from states of some text [n, d], so that every direction counts alike.

        Args:
            ridge: share of the mean variance that is added to each direction's, so that silent ones stay silent.
        """
        states = states.double()
        mean = states.mean(0)
        values, vectors = torch.linalg.eigh((states - mean).T @ (states - mean) / len(states))
        shrink = (values.clamp(min=0) + ridge * values.mean()).rsqrt()
        self.mean.copy_(mean)
        self.map.copy_((vectors * shrink) @ vectors.T)

    def forward(
        self,
        states: Tensor,
        mask: Tensor,
        address: Tensor | None = None,
        visible: Tensor | None = None,
        carried: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """Addresses of edits, or each token's choice among addresses.

        Args:
            states: a low layer's input [B, T, d].
            mask: 1 for text, 0 for padding [B, T].
            address: of the pool's edits [N, d]; None: the rows are edits, return their addresses.
            visible: which edits a row may see [B, N], bool.
            carried: the best matches of the row's earlier tokens [B, N], when these are not in `states`.
            temperature: divides the logits.

        Returns:
            without `address`: addresses [B, d], twice. With it: log-probabilities [B, T, N + 1], the zero-gist last,
            and the best matches so far [B, N].
        """
        with torch.autocast(states.device.type, enabled=False):
            keep = mask.bool()[..., None]
            mapped = (states.float() - self.mean.float()) @ self.map.float()  # [B, T, d]; DeepSpeed casts modules whole
            if address is None:
                weight = (mapped @ self.emphasis.float()).masked_fill(~keep[..., 0], HIDDEN).softmax(-1)  # [B, T]
                found = F.normalize((weight[..., None] * mapped).sum(1), dim=-1)
                return found, found
            match = F.normalize(mapped, dim=-1) @ address.float().T  # [B, T, N]
            match = match.masked_fill(~keep, -1.0)
            if carried is not None:
                match = torch.cat([carried[:, None], match], dim=1)
            match = match.cummax(dim=1).values
            if carried is not None:
                match = match[:, 1:]
            scale = self.log_scale.float().exp() / temperature
            logits = scale * (match - self.threshold.float())
            if visible is not None:
                logits = logits.masked_fill(~visible[:, None], HIDDEN)
            zero = torch.full_like(logits[..., :1], 0.0 if self.zero_gist else HIDDEN)
            return F.log_softmax(torch.cat([logits, zero], dim=-1), dim=-1), match[:, -1]


def read(logp: Tensor, values: Tensor, heads: int) -> Tensor:
    """What tokens read by one choice for all heads: logp [B, T, N + 1], values [N, K, D] -> [B, T, heads, D]."""
    n, k, width = values.shape
    out = logp[..., :-1].exp().to(values.dtype) @ values.reshape(n, k * width)  # the zero-gist's value is zero
    return out.unflatten(-1, (k, width)).repeat_interleave(heads // k, dim=2)
