"""What the teacher predicts at the targets of many questions, each asked once and kept on disk.

The teacher is the unedited model with an editor's text before the prompts that are in its edits' scope, and with
nothing before the others (paper, eq. 5). Questions with the same text before them share the pass through it: of
several hundred tokens each, it is nearly all of the work.

G contexts, R rows, P tokens that the rows of a context share, S tokens after them, n target tokens, d hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.tokens import Encoded, encode, pad, pad_id
from modules.backbone import Backbone
from modules.distill.queries import Question

ROOM = 32  # tokens that a context leaves free for the answer, at least


class Contextual(Protocol):
    """An edited model whose edits are text before prompts."""

    def contexts(self, prompts: Sequence[str], room: int) -> list[str | None]:
        """The text before each prompt, leaving room for so many tokens of the answer; None: nothing stands there."""
        ...


@dataclass(frozen=True)
class Asked:
    """A question as the teacher is asked it.

    Args:
        context: what stands before the prompt; None where the question is out of every edit's scope.
        row: its tokens.
    """

    question: Question
    context: str | None
    row: Encoded


def asked_of(edited: Contextual, backbone: Backbone, questions: Sequence[Question]) -> list[Asked]:
    """Questions with what the editor says before them.

    Raises:
        ValueError: where the context changes how a target is cut into tokens, so that teacher and student would predict
            different ones.
    """
    tokenizer = backbone.tokenizer
    alone = [encode(tokenizer, q.prompt, q.target) for q in questions]
    longest = max((len(row.target_ids) for row in alone), default=0)
    contexts = edited.contexts([q.prompt for q in questions], max(ROOM, longest + 1))
    found = []
    for question, own, context in zip(questions, alone, contexts, strict=True):
        row = own if context is None else encode(tokenizer, question.prompt, question.target, context)
        if row.target_ids != own.target_ids:
            raise ValueError(
                f"the tokens of the target {question.target!r} after {question.prompt!r} are others once a context "
                "stands before them: a tokenizer like this one cannot be distilled to"
            )
        found.append(Asked(question, context, row))
    return found


@torch.no_grad()
def last_states(
    backbone: Backbone, asked: Sequence[Asked], batch_size: int, progress: Callable[[int], object] | None = None
) -> list[Tensor]:
    """The last hidden states that predict each question's target tokens [n, d], on the CPU.

    Args:
        batch_size: rows of one pass.
        progress: called with the number of questions done since the last call.
    """
    states: dict[int, Tensor] = {}
    for batch in _batches(asked, batch_size):
        hidden = _pass(backbone, [(asked[i].row, begun, number) for i, begun, number in batch])
        for (i, begun, _), row in zip(batch, hidden, strict=True):
            start, stop = asked[i].row.target_start, len(asked[i].row.ids)
            states[i] = row[start - 1 - begun : stop - 1 - begun].cpu()
        if progress:
            progress(len(batch))
    return [states[i] for i in range(len(asked))]


def _batches(asked: Sequence[Asked], size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Rows of one pass each: its number, how many tokens it shares, and with which of the pass's contexts.

    Contexts of like length stand together, and rows without any, sorted by length.
    """
    groups: dict[str, list[int]] = {}
    for i, one in enumerate(asked):
        if one.context is not None:
            groups.setdefault(one.context, []).append(i)
    shared: list[tuple[int, list[int]]] = []
    for rows in groups.values():
        # what predicts a target's first token is read with the row
        least = min(asked[i].row.target_start for i in rows) - 1
        begun = min(least, shared_start([asked[i].row.ids for i in rows]))
        shared.append((begun, rows))
    alone = [i for i, one in enumerate(asked) if one.context is None]
    alone += [i for begun, rows in shared if not begun for i in rows]
    shared = [group for group in shared if group[0]]
    shared.sort(key=lambda group: group[0])
    parts = [(begun, rows[at : at + size]) for begun, rows in shared for at in range(0, len(rows), size)]
    batch: list[tuple[int, int, int]] = []
    number = 0
    for begun, rows in parts:
        if batch and len(batch) + len(rows) > size:
            yield batch
            batch, number = [], 0
        batch += [(i, begun, number) for i in rows]
        number += 1
    if batch:
        yield batch
    alone.sort(key=lambda i: len(asked[i].row.ids))
    for at in range(0, len(alone), size):
        yield [(i, 0, 0) for i in alone[at : at + size]]


def shared_start(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # if these two share a start, all between them do
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _pass(backbone: Backbone, rows: Sequence[tuple[Encoded, int, int]]) -> Tensor:
    """Last hidden states [R, S, d] of what each row does not share; (row, shared tokens, context's number) for each."""
    decoder, device, fill = backbone.model.base_model, backbone.device, pad_id(backbone.tokenizer)
    tails, tails_mask = (t.to(device) for t in pad([row.ids[begun:] for row, begun, _ in rows], fill))
    if not any(begun for _, begun, _ in rows):
        return decoder(input_ids=tails, attention_mask=tails_mask, use_cache=False).last_hidden_state
    firsts = {number: row.ids[:begun] for row, begun, number in rows}
    heads, heads_mask = (t.to(device) for t in pad(list(firsts.values()), fill, side="left"))  # [G, P]
    own = torch.tensor([number for *_, number in rows], device=device)  # [R]
    read = DynamicCache(config=backbone.model.config)
    positions = (heads_mask.cumsum(1) - 1).clamp(min=0)
    decoder(input_ids=heads, attention_mask=heads_mask, position_ids=positions, cache=read, use_cache=True)
    cache = DynamicCache(config=backbone.model.config)
    for i, layer in enumerate(read.layers):
        cache.update(layer.keys[own], layer.values[own], i)  # type: ignore[index]
    mask = torch.cat([heads_mask[own], tails_mask], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, heads.shape[1] :]
    out = decoder(input_ids=tails, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    return out.last_hidden_state
