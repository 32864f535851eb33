"""Per-token losses over a vocabulary, without ever holding the [tokens, vocabulary] logits.

Each loss takes the last hidden states and the output head, walks over the tokens in chunks and gives one value per
token, so that the caller decides how tokens are weighted and averaged; a weight then scales that token's own gradient.
The logits of a chunk are made again in the backward pass, so memory stays at a few [chunk, V] tensors in both passes.

Under ZeRO-3 the heads must be gathered in the forward and in the backward pass: compute the losses inside the `forward`
of a module that has registered them (`deepspeed.zero.register_external_parameter`).

Shapes: n tokens, c tokens of one chunk, d hidden, V vocabulary, R records.
"""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label without a loss
CHUNK = 1024
LIGER_MINIMUM = "0.8.2"  # before it, the first token's weight scaled the gradient of every token

Backend = Literal["auto", "torch", "liger"]
Direction = Literal["forward", "reverse"]


class Head(NamedTuple):
    """An output projection: `weight [V, d]` and, where the model has one (GPT-J), `bias [V]`."""

    weight: Tensor
    bias: Tensor | None = None

    def log_probs(self, h: Tensor) -> Tensor:
        """`h [c, d]` -> log-probabilities `[c, V]`, in float32 or better."""
        logits = F.linear(h, self.weight, self.bias)
        return F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)


def head_of(model: nn.Module) -> Head:
    """The output head of a transformers causal language model.

    Raises:
        TypeError: the head is not a plain `nn.Linear` (a LoRA layer, say): its weight alone would not give its logits.
        ValueError: the model scales or caps its logits after the head.
    """
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    if not isinstance(head, nn.Linear):
        raise TypeError(
            f"the losses need an output head that is a plain nn.Linear, {type(model).__name__} has "
            f"{type(head).__name__}; leave the head out of the layers that LoRA or an edit replaces"
        )
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            raise ValueError(f"{type(model).__name__} changes its logits after the head (config.{name}): not supported")
    return Head(head.weight, head.bias)


def token_cross_entropy(h: Tensor, head: Head, labels: Tensor, chunk: int = CHUNK, backend: Backend = "auto") -> Tensor:
    """Cross-entropy of each token: `h [n, d]`, `labels [n]` -> `[n]`; 0, without gradient, where the label is -100.

    Args:
        chunk: tokens whose logits exist at one time; Liger chooses its own.
        backend: "liger" is Liger's fused linear cross-entropy (a Triton kernel, so CUDA), "torch" the plain walk,
            "auto" Liger on CUDA where it is installed (float64 excepted) and torch elsewhere.

    Raises:
        ValueError: shapes that do not fit, a chunk below 1, an unknown backend.
        ImportError: backend "liger" without liger-kernel, or with one older than 0.8.2.
    """
    if backend not in ("auto", "torch", "liger"):
        raise ValueError(f"backend must be 'auto', 'torch' or 'liger', got {backend!r}")
    _check_rows(h, labels=labels)
    if len(h) and (backend == "liger" or (backend == "auto" and _prefers_liger(h))):  # Liger cannot take n = 0
        return _liger_cross_entropy()(head.weight, h, labels, head.bias)
    return _walk(h, head, labels, None, None, chunk)[0]


@torch.no_grad()
def token_log_probs(h: Tensor, head: Head, labels: Tensor, chunk: int = CHUNK, backend: Backend = "auto") -> Tensor:
    """Log-probability of each label, without gradient: `h [n, d]`, `labels [n]` -> `[n]`; 0 where the label is -100."""
    return -token_cross_entropy(h, head, labels, chunk, backend)


def token_kl(
    h: Tensor,
    head: Head,
    teacher_h: Tensor,
    teacher_head: Head,
    chunk: int = CHUNK,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """KL divergence of each token between a student and a teacher: `h [n, d]`, `teacher_h [n, d']` -> `[n]`.

    "forward" is KL(teacher || student) (InComeS, arXiv 2505.22156, eq. 2); "reverse" is KL(student || teacher) (IBKE:
    edited || original). Both logits are divided by `temperature`; the result is not multiplied by its square. The
    teacher gets no gradient. Where one vocabulary is wider (a special token was added to the student, or padding rows
    were cut), both are cut to the columns they share, the first min(V, V'), and each is normalised again over these.

    Always the torch walk: Liger's fused KL ops (0.8.5: `LigerFusedLinearJSD`, `LigerFusedLinearKLDivLoss`) return only
    a sum whose gradient is made in the forward pass, so tokens cannot be weighted; neither takes a bias or vocabularies
    of two widths, and the second wants the teacher's [n, V] probabilities.

    Raises:
        ValueError: shapes that do not fit, a chunk below 1, an unknown direction, a temperature that is not positive.
    """
    _check_rows(h, teacher_h=teacher_h)
    return _walk(h, head, None, teacher_h, teacher_head, chunk, direction, temperature)[0]


def token_ce_and_kl(
    h: Tensor,
    head: Head,
    labels: Tensor,
    teacher_h: Tensor,
    teacher_head: Head,
    chunk: int = CHUNK,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`token_cross_entropy` and `token_kl` in one walk, the student's logits made once: `(ce [n], kl [n])`.

    The two terms of the InComeS loss (arXiv 2505.22156, eq. 3). A label of -100 silences the cross-entropy of a token
    and leaves its KL: the released code distils the query tokens too. Temperature is that of the KL alone.

    Raises:
        ValueError: as `token_kl`.
    """
    _check_rows(h, labels=labels, teacher_h=teacher_h)
    ce, kl = _walk(h, head, labels, teacher_h, teacher_head, chunk, direction, temperature)
    return ce, kl


def edit_sensitivity(logp_with: Tensor, logp_without: Tensor, scale: float = 1.0) -> Tensor:
    """How much the edit in context helps the teacher at each token: `[n]`, `[n]` -> `scale * relu(with - without) [n]`.

    InComeS (arXiv 2505.22156) eq. 1, where the scale is 1; the released code has 0.5. Without gradient.
    """
    return scale * (logp_with - logp_without).relu().detach()


def weighted_mean(values: Tensor, weights: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Per record, sum(w v) / count(w != 0): `values [n]`, `weights [n]`, `rows [n]` (a token's record) -> `[R]`.

    0 for a record in which no token has a weight (the code released with InComeS divides by 0 there). A token with a
    weight and the label -100 adds nothing above and counts below, as in that code; give it weight 0 to leave it out.
    """
    totals = values.new_zeros(num_rows)
    counts = totals.index_add(0, rows, (weights != 0).to(values.dtype))  # [R]
    return totals.index_add(0, rows, weights.to(values.dtype) * values) / counts.clamp(min=1)


def mean_per_row(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Mean of each record's tokens: `values [n]`, `rows [n]` -> `[R]`; 0 for a record without tokens."""
    return weighted_mean(values, torch.ones_like(values), rows, num_rows)


def _walk(
    h: Tensor,
    head: Head,
    labels: Tensor | None,
    teacher_h: Tensor | None,
    teacher_head: Head | None,
    chunk: int,
    direction: Direction = "forward",
    temperature: float = 1.0,
) -> Tensor:
    """The losses asked for, `[k, n]`: cross-entropy where there are labels, then KL where there is a teacher."""
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    if direction not in ("forward", "reverse"):
        raise ValueError(f"direction must be 'forward' or 'reverse', got {direction!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")

    def losses(start: int) -> Tensor:
        rows = slice(start, start + chunk)
        found = []
        student = head.log_probs(h[rows])  # [c, V]
        if labels is not None:
            found.append(F.nll_loss(student, labels[rows], ignore_index=IGNORE, reduction="none"))  # [c]
        if teacher_h is not None and teacher_head is not None:
            with torch.no_grad():
                teacher = teacher_head.log_probs(teacher_h[rows])  # [c, V']
            width = min(student.shape[1], teacher.shape[1])
            student, teacher = (_renormalise(logp, width, temperature) for logp in (student, teacher))  # [c, width]
            p, q = (teacher, student) if direction == "forward" else (student, teacher)
            found.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))  # KL(p || q) [c]
        return torch.stack(found)  # [k, c]

    starts = range(0, max(len(h), 1), chunk)
    if len(starts) == 1 or not torch.is_grad_enabled():
        return torch.cat([losses(start) for start in starts], dim=1)
    remade = [checkpoint(losses, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    return torch.cat(remade, dim=1)


def _renormalise(logp: Tensor, width: int, temperature: float) -> Tensor:
    """Log-probabilities `[c, V]` -> those of the first `width` columns at a temperature, `[c, width]`."""
    if width == logp.shape[1] and temperature == 1:
        return logp
    return F.log_softmax(logp[:, :width] / temperature, dim=-1)


def _check_rows(h: Tensor, **others: Tensor) -> None:
    for name, x in (("h", h), *others.items()):
        if x.ndim != (1 if name == "labels" else 2) or len(x) != len(h):
            raise ValueError(
                f"{name} has shape {list(x.shape)} beside h {list(h.shape)}: select the tokens first, so that hidden "
                "states are [n, d] and labels [n]"
            )


def _prefers_liger(h: Tensor) -> bool:
    if not h.is_cuda or h.dtype == torch.float64:
        return False
    try:
        _liger_cross_entropy()
    except ImportError as error:
        warnings.warn(f"cross-entropy runs on the slower torch path: {error}", stacklevel=3)
        return False
    return True


@cache
def _liger_cross_entropy() -> nn.Module:
    """Liger's loss with one value per token; it makes its gradients in the backward pass, each scaled by its weight."""
    remedy = f"pip install 'liger-kernel>={LIGER_MINIMUM}', or choose backend='torch'"
    try:
        found = version("liger-kernel")
    except PackageNotFoundError:
        raise ImportError(f"liger-kernel is not installed; {remedy}") from None
    if Version(found) < Version(LIGER_MINIMUM):
        raise ImportError(f"liger-kernel {found} scales every token's gradient by the first token's weight; {remedy}")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORE, reduction="none", accum_dtype=torch.float32)
