"""Text to tokens: the one place where prompts, targets and edits are tokenised.

Everything else works on the spans returned here, so a target's tokens are the same whichever editor asks for them.
Shapes: R rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.records import join

MASKED = -100  # label of a token that is not scored, torch's own default


@dataclass(frozen=True)
class Encoded:
    """Token ids of `prompt target` and the index of the target's first token; the target reaches to the end."""

    ids: tuple[int, ...]
    target_start: int

    @property
    def target_ids(self) -> tuple[int, ...]:
        return self.ids[self.target_start :]


def encode(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str = "", context: str = "", bos: bool = True
) -> Encoded:
    """Tokenise `context + prompt + target` and find the target by character offsets.

    Prompt and target are tokenised as one text, so that merges across the boundary come out as in running text; the
    first token that reaches into the target is the first target token. A BOS stands in front exactly when the tokenizer
    puts one there itself, and only with `bos`; an EOS is never appended.

    Raises:
        ValueError: if the text is empty, or the target is white space.
    """
    stem = context + prompt
    text = join(stem, target) if target else stem
    if not text:
        raise ValueError("nothing to tokenise: prompt, target and context are all empty")
    if target and not target.strip():
        raise ValueError(f"the target after {prompt!r} is nothing but white space: {target!r}")
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = list(out["input_ids"])
    start = len(ids)
    if target:
        target_char = len(text) - len(target.lstrip())
        start = next(i for i, (_, end) in enumerate(out["offset_mapping"]) if end > target_char)
    if bos and adds_bos(tokenizer):
        ids, start = [tokenizer.bos_token_id, *ids], start + 1
    return Encoded(tuple(ids), start)


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
