"""Time and memory of encoding edits and of decoding under them (InComeS, tables 4 and 5), of any Edited alike."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.editor import Edited
from modules.evaluation import now
from modules.gist.editor import GistEdited


@dataclass(frozen=True)
class Decoding:
    """Seconds of answering one query alone, each a median over queries.

    Args:
        prompt: to read the prompt, and with it what was encoded, and to give the first token.
        token: for each token after that.
    """

    prompt: float
    token: float


@dataclass(frozen=True)
class Measured:
    """One editor under so many edits; None where it could not be measured, and `error` says why.

    Args:
        made_up: whether the records did not suffice, and edits were made of theirs.
        encode_seconds: to make all edits, from text; a median.
        prompt_seconds, token_seconds: see `Decoding`.
        state_bytes: what is kept of the edits.
        peak_bytes: the most memory that was held while encoding and decoding, above what was held before.
        reliability, generality: teacher-forced token accuracy, of records whose edits are in the pool; None where they
            are made up.
    """

    editor: str
    edits: int
    made_up: bool
    encode_seconds: float | None = None
    prompt_seconds: float | None = None
    token_seconds: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    reliability: float | None = None
    generality: float | None = None
    error: str | None = None


@torch.no_grad()
def prefill(edited: Edited) -> None:
    """Read what the edits put before every prompt, and keep it; nothing for a method that puts nothing there."""
    edited._after_prefix(torch.ones(1, 1, dtype=torch.long, device=edited.backbone.device))


def state_bytes(edited: Edited) -> int:
    """What is kept of the edits: a pool's gists, or the keys and values of a context that was read."""
    if isinstance(edited, GistEdited):
        return sum(t.nbytes for t in edited.pool.tensors().values())
    if edited._prefix is None:
        return 0
    return sum(t.nbytes for layer in edited._prefix[1].layers for t in (layer.keys, layer.values))


@torch.no_grad()
def decoding(edited: Edited, prompts: Sequence[str], new_tokens: int = 16) -> Decoding:
    """Answer prompts one by one, greedily, each by exactly so many tokens, whatever they are.

    A context's keys and values are copied for each query, as for any answer; that is not timed.

    Raises:
        ValueError: where an answer would leave the context window, or for less than two tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, the first comes with the prompt; got {new_tokens}")
    prompt, token = [], []
    for text in prompts:
        ids = encode(edited.backbone.tokenizer, text, bos=edited.bos and not edited.context).ids
        seconds = _answer(edited, torch.tensor([ids], device=edited.backbone.device), new_tokens)
        prompt.append(seconds[0])
        token += seconds[1:]
    return Decoding(median(prompt), median(token))


def _answer(edited: Edited, ids: Tensor, new_tokens: int) -> list[float]:
    """Seconds of each pass: the prompt's [1, T], then one for each token."""
    backbone = edited.backbone
    _, mask, options = edited._after_prefix(torch.ones_like(ids))
    edited._check_room(mask.shape[1] + new_tokens - 1)
    cache = options.get("cache") or DynamicCache(config=backbone.model.config)
    state: Any = None
    seconds = []
    for _ in range(new_tokens):
        start = now(backbone)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        out, state = edited.decode(ids, mask, state, cache=cache, position_ids=positions, use_cache=True)
        ids = backbone.logits(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        seconds.append(now(backbone) - start)
    return seconds


def accuracy(edited: Edited, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 4) -> float:
    """Mean teacher-forced token accuracy (modules/metrics.py)."""
    scores = edited.score(prompts, targets, batch_size=batch_size)
    return sum(s.accuracy for s in scores) / len(scores)


def made_up(requests: Sequence[EditRequest], count: int, seed: int = 0) -> list[EditRequest]:
    """`count` different edits about as long as these: beyond these, the prompts of some with the targets of others.

    They contradict one another, so they are for time and memory alone.

    Raises:
        ValueError: where so many cannot be made.
    """
    found = {r.statement: r for r in requests}
    pairs = [r for r in requests if r.target and not r.text]
    draw = random.Random(seed)
    others = draw.sample(pairs, len(pairs))
    for shift in range(1, len(pairs)):
        for i, request in enumerate(others):
            if len(found) >= count:
                break
            other = replace(request, target=others[(i + shift) % len(others)].target)
            found.setdefault(other.statement, other)
    if len(found) < count:
        raise ValueError(f"{len(requests)} edits make at most {len(found)} different ones, not {count}; give more data")
    return list(found.values())[:count]
