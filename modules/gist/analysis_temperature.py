"""The temperature of selection by entropy alignment (InComeS, section 4.4 and figure 4a).

A choice among more gists is less decided. The temperature that keeps it as decided as it was among few is the one at
which its entropy is theirs. As in the paper, the texts are copies of the edits. Entropies are of the whole choice, the
zero-gist with the gists (over a single gist alone there is none), of each head and token, and then means.

L layers (1 where all share one choice), B rows, H heads, T tokens, N edits, S choices: tokens times heads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.tokens import encode, pad, pad_id
from modules.gist.analysis import pools
from modules.gist.editor import GistEdited
from modules.gist.model import GistModel

Tokens = Literal["all", "answer"]
LOWEST, HIGHEST = 2.0**-8, 2.0**8  # where temperatures are looked for
HOT = 10  # the smallest pool in which selection has a temperature (GistModel.forward)


@dataclass(frozen=True)
class Aligned:
    """One pool size against the reference.

    Args:
        edits: in a pool.
        entropy: by layer, at temperature 1 [L], in nats.
        temperatures: by layer, at which its entropy is the reference's [L]; None: no temperature does that.
        temperature: one for all layers, at which their mean entropy is the reference's; None: none does.
        entropy_then: by layer, measured with `temperature` set in all layers [L]. Where one layer's reading changes the
            queries of those above it (`qk`), it is not quite what was aimed at. None also for pools of less than ten,
            in which selection has no temperature.
        texts: how many were read.
    """

    edits: int
    entropy: list[float]
    temperatures: list[float | None]
    temperature: float | None
    entropy_then: list[float] | None
    texts: int


def align(
    edited: GistEdited,
    records: Sequence[EditRecord],
    sizes: Sequence[int],
    reference: int,
    texts: int = 100,
    tokens: Tokens = "all",
    progress: Callable[[int], None] = lambda _: None,
) -> list[Aligned]:
    """Temperatures for pools of these sizes, and of the reference itself (at which it is 1).

    Choices are kept while they are aligned: 4 L S (N + 1) bytes, S of them the texts' tokens times the heads.

    Args:
        edited: under the first edits of all records.
        reference: the pool size whose entropy is aligned to (paper: 1).
        texts: how many edits are read as texts, over as many pools as that takes.
        tokens: which of a text's tokens count: all that predict another one (paper), or those that predict the answer.
        progress: called with a pool size that is done.

    Raises:
        ValueError: for a size of which there is no full pool.
    """
    wanted: list[float] = []
    found = []
    for size in dict.fromkeys([reference, *sizes]):
        logits = choices(edited, records, size, texts, tokens)
        wanted = wanted or [entropy(layer) for layer in logits]
        one = aligned(logits, sum(wanted) / len(wanted))
        each = [aligned([layer], target) for layer, target in zip(logits, wanted, strict=True)]
        now = [entropy(layer) for layer in logits]
        then = None
        if one and size >= HOT:
            then = [entropy(layer) for layer in choices(edited, records, size, texts, tokens, one)]
        found.append(Aligned(size, now, each, one, then, min(texts, len(records) // size * size)))
        progress(size)
    return sorted(found, key=lambda a: a.edits)


def entropy(logits: Tensor, temperature: float = 1.0) -> float:
    """Mean entropy in nats of the choices [S, N + 1] at a temperature."""
    logp = (logits.double() / temperature).log_softmax(-1)
    return float(-(logp.exp() * logp).sum(-1).mean())


def aligned(logits: Sequence[Tensor], wanted: float, steps: int = 24) -> float | None:
    """The temperature at which the mean entropy of the layers' choices, each [S, N + 1], is as wanted; None: none is.

    By bisection of its logarithm: entropy grows with temperature, dH/dT = Var(logits) / T^3.
    """

    def mean(temperature: float) -> float:
        return sum(entropy(layer, temperature) for layer in logits) / len(logits)

    low, high = LOWEST, HIGHEST
    if not mean(low) <= wanted <= mean(high):
        return None
    for _ in range(steps):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if mean(middle) < wanted else (low, middle)
    return (low * high) ** 0.5


@torch.no_grad()
def choices(
    edited: GistEdited,
    records: Sequence[EditRecord],
    size: int,
    texts: int,
    tokens: Tokens = "all",
    temperature: float = 1.0,
) -> list[Tensor]:
    """Logits of every choice that tokens of the edits' texts make, by layer [S, N + 1], up to a constant in each row.

    Args:
        temperature: of selection in all layers while the texts are read.

    Raises:
        ValueError: where there are fewer records than `size`.
    """
    if size > len(records):
        raise ValueError(f"a pool of {size} edits cannot be made of {len(records)} records")
    parts, left = [], texts
    with at_temperature(edited.model, temperature):
        for pool in islice(pools(edited, records, size), -(-texts // size)):
            parts.append(_read_itself(pool, min(size, left), tokens))
            left -= size
    return [torch.cat(layers) for layers in zip(*parts, strict=True)]


def _read_itself(pool: GistEdited, texts: int, tokens: Tokens, batch_size: int = 32) -> list[Tensor]:
    """What the tokens of a pool's first edits choose in it: logits by layer, each [S, N + 1]."""
    tokenizer, device = pool.backbone.tokenizer, pool.backbone.device
    parts = []
    for at in range(0, texts, batch_size):
        requests = pool.requests[at : min(at + batch_size, texts)]
        # a copy of the edit; where it is a statement of its own, nothing says which tokens are the answer
        copies = [(r.prompt, r.target) if r.target and not r.text else (r.statement, "") for r in requests]
        rows = [encode(tokenizer, prompt, target, bos=pool.bos) for prompt, target in copies]
        ids, mask = pad([r.ids for r in rows], pad_id(tokenizer))
        counted = mask.bool()
        for row, keep in zip(rows, counted, strict=True):
            keep[len(row.ids) - 1] = False  # it predicts nothing of the text
            if tokens == "answer" and row.target_ids:
                keep[: row.target_start - 1] = False
        with by_head(pool.model) as heads:
            trace: dict[int, Tensor] = {}
            pool.decode(ids.to(device), mask.to(device), trace=trace)
        shared = list({id(t): t[:, None] for t in trace.values()}.values())
        logits = list(heads.values()) or shared  # [B, H, T, N + 1] a layer; H is 1 where all heads share a choice
        parts.append([layer.transpose(1, 2)[counted.to(device)].flatten(0, 1) for layer in logits])
    return [torch.cat(layers) for layers in zip(*parts, strict=True)]


@contextmanager
def by_head(model: GistModel) -> Iterator[dict[int, Tensor]]:
    """Collects, of the passes within, what each head of each layer with a selector of its own chooses [B, H, T, N + 1].
    A model's own trace is the mean over heads, whose entropy is not the mean entropy."""
    found: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...]) -> None:
            query, gists, visible, scaling, temperature, scope, *_ = args
            found[layer] = module.log_probs(query, gists, visible, scaling, temperature, scope)

        return hook

    handles = [s.register_forward_pre_hook(keep(int(i))) for i, s in model.selectors.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def at_temperature(model: GistModel, temperature: float) -> Iterator[None]:
    """The model with another temperature at inference, for pools of ten and more; smaller ones always have 1."""
    before = model.config
    model.config = replace(before, temperature=temperature)
    try:
        yield
    finally:
        model.config = before
