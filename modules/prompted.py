"""Editors that put text before the prompt. What differs between them is which text before which (`PromptEditor.tell`).

Prompts with the same text before them share its keys and values, which are computed once for all of them.
"""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from datamodules.tokens import Encoded, encode
from modules.backbone import Backbone
from modules.editor import Edited, TargetScore
from modules.memory import EditMemory
from modules.remembering import MemoryEditor, Remembering

ROOM = 32  # tokens that a context leaves free for an answer, at least


@dataclass(frozen=True)
class Context:
    """Text before a prompt.

    Args:
        last: what always stands there, next to the prompt.
        parts: what stands before it, in order. Where the context window is too short, the first of them go first.
    """

    last: str
    parts: tuple[str, ...] = ()

    def text(self, dropped: int = 0) -> str:
        """The whole of it, without so many parts."""
        return "".join((*self.parts[dropped:], self.last))


class PromptEditor(MemoryEditor):
    """An editor that says something before a query."""

    @abstractmethod
    def tell(self, memory: EditMemory, prompts: Sequence[str]) -> list[Context | None]:
        """What stands before each prompt, given a memory that is not empty; None: nothing, the prompt is out of scope.

        It depends on the prompt and the memory alone.
        """

    def unedited(self, backbone: Backbone) -> "Prompted":
        """See `MemoryEditor.unedited`."""
        return Prompted(self, backbone, EditMemory(self.sentences))


class Prompted(Remembering):
    """A model that is told something before each prompt; or nothing, and then it answers as the unedited model does."""

    editor: PromptEditor

    def __init__(self, editor: PromptEditor, backbone: Backbone, memory: EditMemory) -> None:
        super().__init__(editor, backbone, memory)
        self._told: dict[str, Context | None] = {}

    def contexts(self, prompts: Sequence[str], room: int = ROOM) -> list[str | None]:
        """The text before each prompt, as much of it as the context window holds; None where nothing is said.

        Args:
            room: tokens of the window that are left free for the answer.
        """
        new = [p for p in dict.fromkeys(prompts) if p not in self._told]
        if new and len(self.memory):
            self._told.update(zip(new, self.editor.tell(self.memory, new), strict=True))
        return [self._fitting(p, c, room) if (c := self._told.get(p)) else None for p in prompts]

    def context_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens longer each prompt becomes."""

        def length(text: str) -> int:
            return len(encode(self.backbone.tokenizer, text, bos=False).ids) if text else 0

        return [length(c + p) - length(p) if c else 0 for p, c in zip(prompts, self.contexts(prompts), strict=True)]

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        """See `Edited.score`. A context's parts go one by one, the farthest first, where they do not fit the window."""
        pairs = list(zip(prompts, targets, strict=True))
        longest = max((len(self._encode("", target).ids) for target in set(targets)), default=0)
        contexts = self.contexts(prompts, max(ROOM, longest + 1))
        out = [i for i, context in enumerate(contexts) if context is None]
        plain = super().score([prompts[i] for i in out], [targets[i] for i in out], batch_size, top_k)
        scores = dict(zip(out, plain, strict=True))
        rows = {i: self._encode(*pairs[i], c) for i, c in enumerate(contexts) if c is not None}
        starts = {i: row.target_start for i, row in rows.items()}
        for reader, batch, cut in self._batches(contexts, rows, starts, batch_size):
            short = [Encoded(rows[i].ids[cut:], rows[i].target_start - cut) for i in batch]
            scores.update(zip(batch, reader._score(short, top_k), strict=True))
        return [scores[i] for i in range(len(pairs))]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """See `Edited.generate`, and `score`."""
        for prompt in set(prompts):
            self._encode(prompt, "")  # an empty one is refused here, whatever stands before it
        contexts = self.contexts(prompts, max(ROOM, max_new_tokens))
        out = [i for i, context in enumerate(contexts) if context is None]
        texts = dict(zip(out, super().generate([prompts[i] for i in out], max_new_tokens, batch_size), strict=True))
        rows = {i: self._encode(prompts[i], "", c) for i, c in enumerate(contexts) if c is not None}
        starts = {i: len(row.ids) - 1 for i, row in rows.items()}
        for reader, batch, cut in self._batches(contexts, rows, starts, batch_size):
            new = reader._generate([rows[i].ids[cut:] for i in batch], max_new_tokens)
            decode = self.backbone.tokenizer.decode
            texts.update((i, str(decode(ids, skip_special_tokens=True))) for i, ids in zip(batch, new, strict=True))
        return [texts[i] for i in range(len(prompts))]

    def _batches(
        self, contexts: Sequence[str | None], rows: dict[int, Encoded], starts: dict[int, int], batch_size: int
    ) -> Iterator[tuple[Edited, list[int], int]]:
        """Rows in batches, shorter ones first: who reads them, their numbers, and how many tokens it has read already.

        Args:
            starts: so many tokens of a row can be read beforehand.
        """
        groups: dict[str, list[int]] = {}
        for i in rows:
            groups.setdefault(str(contexts[i]), []).append(i)
        alone: list[int] = []
        for group in groups.values():
            # tokens, not characters: what a context's end and a prompt's start merge into is read with the prompt
            cut = min(_shared([rows[i].ids for i in group]), *(starts[i] for i in group))
            if len(group) == 1 or cut == 0:
                alone += group
                continue
            begun = _Begun(self.backbone, rows[group[0]].ids[:cut])
            for batch in _cut(group, rows, batch_size):
                yield begun, batch, cut
        for batch in _cut(alone, rows, batch_size):
            yield self, batch, 0

    def _fitting(self, prompt: str, context: Context, room: int) -> str:
        window: int = getattr(self.backbone.model.config, "max_position_embeddings", None) or 0

        def fits(dropped: int) -> bool:
            return len(self._encode(prompt, "", context.text(dropped)).ids) + room <= window

        if not window or fits(0):
            return context.text()
        return context.text(bisect_left(range(len(context.parts)), True, lo=1, key=fits))

    def _encode(self, prompt: str, target: str, context: str | None = None) -> Encoded:
        return encode(self.backbone.tokenizer, prompt, target, context or "", bos=self.bos)


class _Begun(Edited):
    """A backbone that has read some tokens, with which all its rows begin."""

    def __init__(self, backbone: Backbone, ids: Sequence[int]) -> None:
        super().__init__(backbone, context="begun")
        read = torch.tensor([ids], device=backbone.device)
        out, _ = self.decode(read, torch.ones_like(read), use_cache=True)
        self._prefix = (out.last_hidden_state[0, -1], out.cache)


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with."""
    first, last = min(rows), max(rows)  # in the order of their tokens, so that the others lie between
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))


def _cut(numbers: Sequence[int], rows: dict[int, Encoded], batch_size: int) -> Iterator[list[int]]:
    order = sorted(numbers, key=lambda i: len(rows[i].ids))
    return (order[at : at + batch_size] for at in range(0, len(order), batch_size))
