"""Editors that put text before the prompt. What differs between them is which text before which (`PromptEditor.tell`).

Prompts with the same text before them share its keys and values, as all prompts that begin alike do (`prefixes`).
"""

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from datamodules.tokens import Encoded, encode
from modules.asked import question_of
from modules.backbone import Backbone
from modules.editor import TargetScore
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

        It depends on the prompt and the memory alone. Of a prompt that begins with solved questions it is given the
        question.
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
            self._told.update(zip(new, self.editor.tell(self.memory, [question_of(p) for p in new]), strict=True))
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
        told = [i for i, context in enumerate(contexts) if context is not None]
        rows = [self._encode(*pairs[i], contexts[i]) for i in told]
        scores.update(zip(told, self._score_rows(rows, batch_size, top_k), strict=True))
        return [scores[i] for i in range(len(pairs))]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """See `Edited.generate`, and `score`."""
        for prompt in set(prompts):
            self._encode(prompt, "")  # an empty one is refused here, whatever stands before it
        contexts = self.contexts(prompts, max(ROOM, max_new_tokens))
        out = [i for i, context in enumerate(contexts) if context is None]
        texts = dict(zip(out, super().generate([prompts[i] for i in out], max_new_tokens, batch_size), strict=True))
        told = [i for i, context in enumerate(contexts) if context is not None]
        rows = [self._encode(prompts[i], "", contexts[i]).ids for i in told]
        texts.update(zip(told, self._generate_rows(rows, max_new_tokens, batch_size), strict=True))
        return [texts[i] for i in range(len(prompts))]

    def _fitting(self, prompt: str, context: Context, room: int) -> str:
        window: int = getattr(self.backbone.model.config, "max_position_embeddings", None) or 0

        def fits(dropped: int) -> bool:
            return len(self._encode(prompt, "", context.text(dropped)).ids) + room <= window

        if not window or fits(0):
            return context.text()
        return context.text(bisect_left(range(len(context.parts)), True, lo=1, key=fits))

    def _encode(self, prompt: str, target: str, context: str | None = None) -> Encoded:
        return encode(self.backbone.tokenizer, prompt, target, context or "", bos=self.bos)
