"""Text to tokens and back: the one place where prompts, targets and edits are tokenised.

Everything else works on the spans returned here, so a target's tokens are the same whichever editor asks for them.
Shapes: R rows, T tokens.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.records import join

_NOWHERE: tuple[int, int] = (0, 0)  # the characters of a BOS


@dataclass(frozen=True)
class Encoded:
    """Token ids of `prompt target` and the index of the target's first token; the target reaches to the end."""

    ids: tuple[int, ...]
    target_start: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.target_start :]


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    target: str = "",
    context: str = "",
    bos: bool = True,
    after: str = "",
) -> Encoded:
    """Tokenise `context + prompt + target` and find the target by character offsets.

    Prompt and target are tokenised as one text, so that merges across the boundary come out as in running text. The
    target begins with the first token that reaches into it or, where the space before it is a token of its own, as
    before numbers in Llama 3, Qwen and SmolLM2, with that: nobody gives a model the space that it has to write. A BOS
    stands in front exactly when the tokenizer puts one there itself, and only with `bos`; an EOS is never appended.

    Args:
        after: text that all this follows, where that is read by itself, once for many: no token is of it.

    Raises:
        ValueError: if the text is empty, or the target is white space.
    """
    stem = context + prompt
    text = join(stem, target) if target else stem
    if not text:
        raise ValueError("nothing to tokenise: prompt, target and context are all empty")
    if target and not target.strip():
        raise ValueError(f"the target after {prompt!r} is nothing but white space: {target!r}")
    ids, offsets = _tokens(tokenizer, text, bos, after)
    start = len(ids)
    if target:
        target_char = len(text) - len(target.lstrip())
        begins = (end > target_char or (begin >= len(stem) and (begin, end) != _NOWHERE) for begin, end in offsets)
        start = next(i for i, here in enumerate(begins) if here)
    return Encoded(ids, start)


def encode_subject(
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    subject: str,
    target: str = "",
    context: str = "",
    bos: bool = True,
    occurrence: Literal["first", "last"] = "last",
) -> tuple[Encoded, int]:
    """`encode`, and the index of the subject's last token in it, by character offsets.

    The subject is looked for in the prompt alone, as whole words before parts of words. A token that reaches over the
    subject's end, as merges may, still counts as its last one.

    Args:
        occurrence: which one is taken where the prompt names the subject several times. The last has seen most.

    Raises:
        ValueError: where the prompt does not hold the subject; and see `encode`.
    """
    encoded = encode(tokenizer, prompt, target, context, bos)
    places = [m.end() for m in re.finditer(rf"(?<!\w){re.escape(subject)}(?!\w)", prompt)] if subject else []
    places = places or ([m.end() for m in re.finditer(re.escape(subject), prompt)] if subject else [])
    if not places:
        raise ValueError(f"the subject {subject!r} does not stand in the prompt {prompt!r}; a subject is a part of it")
    end = len(context) + places[-1 if occurrence == "last" else 0]
    stem = context + prompt
    _, offsets = _tokens(tokenizer, join(stem, target) if target else stem, bos)
    return encoded, max(i for i, (start, stop) in enumerate(offsets) if start < end and stop > start)


def continuation(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], new: Sequence[int]) -> str:
    """New tokens as text that follows what stood before them, with the space between the two where there is one.

    Decoded alone, the first of them would lose its space in tokenizers that mark words (SentencePiece, Llama 2), and
    the end of a word could not be told from a new one.
    """
    tail = list(before[-8:])  # enough to be no beginning of a text
    first, both, alone = (str(tokenizer.decode(i, skip_special_tokens=True)) for i in (tail, [*tail, *new], list(new)))
    return both.removeprefix(first) if both.startswith(first) else alone  # not so where new bytes complete a character


def windows(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], length: int, tokens: int, bos: bool = True
) -> Iterator[tuple[int, ...]]:
    """Running text cut into windows of `length` tokens, the last one as long as it comes, `tokens` of them in all.

    Texts follow one another with a blank line between them; each window begins with a BOS where the tokenizer uses one.
    """
    head: tuple[Any, ...] = (tokenizer.bos_token_id,) if bos and adds_bos(tokenizer) else ()
    room = length - len(head)
    waiting: list[int] = []
    left = tokens
    before = ""
    for text in texts:
        waiting += _tokens(tokenizer, text + "\n\n", bos=False, after=before)[0]
        before = "\n"
        while len(waiting) >= room and left > 0:
            window = (*head, *waiting[:room])[:left]
            yield window
            waiting, left = waiting[room:], left - len(window)
        if left <= 0:
            return
    if waiting:
        yield (*head, *waiting)[:left]


def _tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, bos: bool, after: str = ""
) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Ids of a text and the characters [start, end) of each; a BOS has none.

    Tokenizers that mark words (SentencePiece, Llama 2) put a space before a text's first one. A text that follows
    another is tokenised behind the last character of that one, and is given no such space; byte-level tokenizers give
    the same ids either way. Where a token reaches over both, the text is tokenised alone.
    """
    out = tokenizer(after[-1:] + text, add_special_tokens=False, return_offsets_mapping=True)
    found: list[Any] = list(zip(out["input_ids"], out["offset_mapping"], strict=True))
    if after:
        lead = tokenizer(after[-1], add_special_tokens=False)["input_ids"]
        if [i for i, _ in found[: len(lead)]] != lead:
            return _tokens(tokenizer, text, bos)
        found = [(i, (start - 1, end - 1)) for i, (start, end) in found[len(lead) :]]
    head: list[Any] = [(tokenizer.bos_token_id, _NOWHERE)] if bos and adds_bos(tokenizer) else []
    return tuple(i for i, _ in (*head, *found)), [(start, end) for _, (start, end) in (*head, *found)]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether this tokenizer by itself begins a text with its BOS."""
    known = getattr(tokenizer, "_palimpsest_adds_bos", None)
    if known is None:
        ids = tokenizer("a")["input_ids"]
        known = tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]
        tokenizer._palimpsest_adds_bos = known  # the answer never changes, and asking costs a tokenisation
    return known


def pad(rows: Sequence[Sequence[int]], value: int, side: str = "right") -> tuple[Tensor, Tensor]:
    """Pad rows of ids to one length. Returns ids [R, T] and attention mask [R, T], both int64."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, where] = torch.tensor(row, dtype=torch.long)
        mask[i, where] = 1
    return ids, mask


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; it is always masked, so any will do where the tokenizer names none."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if isinstance(candidate, int):
            return candidate
    return 0
