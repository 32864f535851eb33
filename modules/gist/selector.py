"""Selection as published: the layer's own queries against the gists' keys (InComeS, arXiv 2505.22156, section 3.2).

B rows, T tokens, N gists in the pool, H query heads, K key-value heads, D head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.gist.pool import LayerGists

HIDDEN = -1e9  # a logit that is never chosen; finite, for the gradient of a logsumexp over -inf is NaN


class GistSelector(nn.Module):
    """One layer's cross-attention over gists and the zero-gist, whose key is learned and whose value is zero.

    Logits are q.k / sqrt(D) per head, the queries rotated to their positions. One softmax over gists only, apart from
    the self-attention's, whose output this one's is added to.

    Args:
        zero_gist: without it every token must read some gist (ablation of the paper's table 6).
    """

    def __init__(self, key_value_heads: int, head_dim: int, zero_gist: bool = True) -> None:
        super().__init__()
        self.zero_gist = zero_gist
        # standard normal, as released; GistModel.calibrate offers the mean query instead
        self.zero_key = nn.Parameter(torch.randn(key_value_heads, head_dim), requires_grad=zero_gist)

    def forward(
        self,
        query: Tensor,
        gists: LayerGists,
        visible: Tensor | None = None,
        scaling: float | None = None,
        temperature: float = 1.0,
        scope: Tensor | None = None,
        trace: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """What each token reads from the pool.

        Args:
            query: the layer's rotated queries [B, H, T, D].
            visible: which gists a row may see [B, N], bool; None: all.
            scaling: the layer's own factor on logits; 1/sqrt(D) by default.
            temperature: divides the logits.
            scope: log-probabilities by which a matcher prefers gists [B, T, N + 1], added to the logits.
            trace: also return the probabilities, which costs a [B, H, T, N + 1] tensor.

        Returns:
            output [B, T, H, D], and with `trace` the log of the probabilities' mean over heads [B, T, N + 1], the
            zero-gist last.
        """
        if trace:
            logp = self.log_probs(query, gists, visible, scaling, temperature, scope)
            grouped = logp[..., :-1].exp().to(gists.values).unflatten(1, (gists.values.shape[1], -1))
            out = torch.einsum("bkgtn,nkd->btkgd", grouped, gists.values).flatten(2, 3)  # the zero-gist's value is zero
            return out, torch.logsumexp(logp, dim=1) - torch.log(torch.tensor(float(logp.shape[1])))
        keys = torch.cat([gists.keys, self.zero_key[None].to(gists.keys)])  # [N + 1, K, D]
        values = torch.cat([gists.values, torch.zeros_like(gists.values[:1])])
        b, heads, t, width = query.shape
        # All rows read the same gists, so they are one long row, and what little they share is repeated for each head:
        # CUDA's fused kernels take a mask only without grouped heads, and would else leave this to plain arithmetic.
        group = heads // keys.shape[1]
        k, v = (
            x.transpose(0, 1).repeat_interleave(group, 0)[None].to(query) for x in (keys, values)
        )  # [1, H, N + 1, D]
        mask = None
        if scope is not None:
            mask = scope.clamp(min=HIDDEN).to(query).flatten(0, 1)  # [B T, N + 1]
        elif visible is not None or not self.zero_gist:
            mask = self._seen(gists, visible)[:, None].expand(b, t, -1).flatten(0, 1)
        scale = (scaling or width**-0.5) / temperature
        long = query.transpose(0, 1).flatten(1, 2)[None]  # [1, H, B T, D]
        out = F.scaled_dot_product_attention(long, k, v, mask, scale=scale)
        return out[0].transpose(0, 1).unflatten(0, (b, t)), None

    def log_probs(
        self,
        query: Tensor,
        gists: LayerGists,
        visible: Tensor | None = None,
        scaling: float | None = None,
        temperature: float = 1.0,
        scope: Tensor | None = None,
    ) -> Tensor:
        """Each head's choice [B, H, T, N + 1], the zero-gist last; arguments as of `forward`."""
        keys = torch.cat([gists.keys, self.zero_key[None].to(gists.keys)])
        scale = (scaling or query.shape[-1] ** -0.5) / temperature
        grouped = query.unflatten(1, (keys.shape[1], -1))  # [B, K, G, T, D]: the heads of a group share keys
        logits = torch.einsum("bkgtd,nkd->bkgtn", grouped.float(), keys.float()) * scale
        if scope is not None:
            logits = logits + scope[:, None, None]
        logits = logits.masked_fill(~self._seen(gists, visible)[:, None, None, None], HIDDEN)
        return F.log_softmax(logits, dim=-1).flatten(1, 2)

    def _seen(self, gists: LayerGists, visible: Tensor | None) -> Tensor:
        """What a row may choose [B or 1, N + 1]."""
        seen = torch.ones(1, len(gists), dtype=torch.bool, device=gists.keys.device) if visible is None else visible
        return F.pad(seen, (0, 1), value=self.zero_gist)
