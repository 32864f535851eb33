"""Time and memory of making edits and of decoding under them (InComeS, tables 4 and 5), of any Edited alike."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRequest
from modules.editor import Edited
from modules.gist.editor import GistEdited
from modules.meter import now
from modules.remembering import Remembering
from modules.training_free.icl import Unchanged


@dataclass(frozen=True)
class Decoding:
    """Seconds of answering one query alone, each a median over queries.

    Args:
        prompt: to read the prompt, and with it what was encoded, and to give the first token. Whatever is done for a
            query before it is answered counts here: to look an edit up (RAG), or to work the whole answer out (MeLLo).
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
        state_bytes: see `state_bytes`.
        peak_bytes: the most memory that encoding and decoding took, see `modules.meter.Meter`.
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
    """Do what all queries have use of, and the first one would wait for: read what the edits put before every prompt,
    encode the edits of a memory. Nothing for other methods."""
    edited._after_prefix(torch.ones(1, 1, dtype=torch.long, device=edited.backbone.device))
    if isinstance(edited, Remembering) and edited.memory.encoder:
        edited.memory.vectors()


def state_bytes(edited: Edited) -> int | None:
    """What is kept of the edits: a pool's gists, the keys and values of a context that was read, or the files that
    `Edited.save` writes. None of an editor that says neither."""
    if isinstance(edited, GistEdited):
        return sum(t.nbytes for t in edited.pool.tensors().values())
    if edited._prefix is not None:
        return sum(t.nbytes for layer in edited._prefix[1].layers for t in (layer.keys, layer.values))
    if isinstance(edited, Unchanged):
        return 0
    with TemporaryDirectory() as folder:
        try:
            edited.save(Path(folder))
        except NotImplementedError:
            return None
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


@torch.no_grad()
def decoding(edited: Edited, prompts: Sequence[str], new_tokens: int = 16) -> Decoding:
    """Answer prompts one by one, greedily, each by exactly so many tokens, whatever they are.

    Raises:
        ValueError: where an answer would leave the context window, or for less than two tokens.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens must be at least 2, the first comes with the prompt; got {new_tokens}")
    first, each = [], []
    with endless(edited.backbone.tokenizer):
        for prompt in prompts:
            first.append(_answering(edited, prompt, 1))
            # what an editor finds out about a prompt it may know by now, and so for both of these
            more, one = (_answering(edited, prompt, n) for n in (new_tokens, 1))
            each.append((more - one) / (new_tokens - 1))
    return Decoding(median(first), median(each))


def _answering(edited: Edited, prompt: str, tokens: int) -> float:
    start = now(edited.backbone)
    edited.generate([prompt], tokens)
    return now(edited.backbone) - start


@contextmanager
def endless(tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Within it the tokenizer knows no end of text, so that no answer ends before its length."""
    end, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        yield
    finally:
        tokenizer.eos_token = end


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
