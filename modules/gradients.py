"""The gradient of an edit in two factors, for many edits at once.

The loss of one edit has, at a linear layer y = x W, the weight gradient `hᵀ u`: h the layer's inputs and u the
gradients of its outputs, at the edit's tokens. One forward and one backward pass give both for a whole batch of
independent edits, since the loss is a sum over rows and no row sees another; the weight's own gradient is never made.

B edits, T tokens, n tokens of all edits that have a gradient.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modules.backbone import Backbone
from modules.interventions import Hook, hooked
from modules.losses import CHUNK, head_of, mean_per_row, token_cross_entropy


class Factors(NamedTuple):
    """The factors of one linear layer, in float32 or better, without gradient.

    Args:
        h: inputs [B, T, d_in].
        u: gradients of the edit's own loss by the outputs [B, T, d_out].
        mask: tokens that have a gradient [B, T]. The others, padding among them, have u = 0 or h = 0 and add nothing.
    """

    h: Tensor
    u: Tensor
    mask: Tensor

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The tokens under the mask side by side: h and u as one [n, d_in + d_out], and the edit of each [n]."""
        edit, at = self.mask.nonzero(as_tuple=True)
        return torch.cat([self.h[edit, at], self.u[edit, at]], dim=1), edit

    def at(self, tokens: Tensor) -> "Factors":
        """Only at these tokens [B, T], such as those that predict the target (see `predicting`)."""
        return Factors(self.h, self.u, self.mask & tokens)


def predicting(answer: Tensor) -> Tensor:
    """The positions whose next token is of the answer: [B, T] of [B, T]. Nothing predicts the first token."""
    return torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], dim=1)


def answer_loss(backbone: Backbone, hidden: Tensor, ids: Tensor, answer: Tensor, chunk: int = CHUNK) -> Tensor:
    """Mean cross-entropy of each row's answer tokens [B]: hidden [B, T, d], ids and answer [B, T]."""
    row, at = predicting(answer).nonzero(as_tuple=True)
    ce = token_cross_entropy(hidden[row, at], head_of(backbone.model), ids[row, at + 1], chunk)
    return mean_per_row(ce, row, len(ids))


def reached(outputs: Iterable[Tensor]) -> set[int]:
    """The ids of the leaves that a gradient of any of these outputs comes to, by their graph; nothing is computed."""
    left = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(left)
    leaves = set()
    while left:
        node = left.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        new = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= new
        left += new
    return leaves


def gradient_factors(
    backbone: Backbone, names: Sequence[str], ids: Tensor, mask: Tensor, answer: Tensor, chunk: int = CHUNK
) -> tuple[dict[str, Factors], Tensor]:
    """The factors of each edit's own loss, the mean cross-entropy of its answer, at the linear layers `names`.

    Works within `no_grad` and `inference_mode`, and on an edited model (within `low_rank`). No `.grad` is touched.

    Args:
        ids, mask: [B, T], right-padded.
        answer: the tokens to be predicted [B, T].
        chunk: tokens whose logits exist at one time.

    Returns:
        The factors by name, and the loss of each edit [B], without gradient.

    Raises:
        ValueError: where nothing is to be predicted.
    """
    if not bool(answer[:, 1:].any()):
        raise ValueError("no edit has a token to predict: an edit needs at least one token before its target")
    inputs: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def probing(name: str) -> Hook:
        def probe(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            # a layer that is run again by gradient checkpointing must not replace what the loss hangs on
            inputs.setdefault(name, given[0].detach())
            if name not in probes:
                probes[name] = torch.zeros_like(output, requires_grad=True)
            return output + probes[name]

        return probe

    with torch.inference_mode(False), torch.enable_grad():
        # what was made in inference mode cannot be kept for a backward pass
        ids, mask, answer = (t.clone() if t.is_inference() else t for t in (ids, mask, answer))
        with hooked(backbone.model, {name: probing(name) for name in names}):
            out = backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            losses = answer_loss(backbone, out.last_hidden_state, ids, answer, chunk)
            # by a zero that is added to an output, not by the output: no weight takes part, whole or in shards
            gradients = torch.autograd.grad(losses.sum(), [probes[name] for name in names])
    factors = {}
    for name, u in zip(names, gradients, strict=True):
        h = inputs[name]
        used = mask.bool() & (u != 0).any(-1) & (h != 0).any(-1)
        wide = torch.promote_types(u.dtype, torch.float32)
        factors[name] = Factors(h.to(wide), u.to(wide), used)
    return factors, losses.detach()
