"""In-context learning: the edits as text before the prompt (ICE, the paper's baseline), and the model left alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor


class Unchanged(Edited):
    """The model under edits that do nothing."""

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["Unchanged"]:
        yield self


class Unedited(Editor):
    """The model as it is: the floor of every comparison, and the reference for locality."""

    name = "unedited"
    reads_pool = False

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        yield Unchanged(backbone)


class Told(Edited):
    """A model that has the edits before every prompt."""

    def __init__(self, editor: "InContext", backbone: Backbone, requests: Sequence[EditRequest], context: str) -> None:
        super().__init__(backbone, context=context)
        self.editor = editor
        self.requests = tuple(requests)

    def edit(self, requests: Sequence[EditRequest]) -> AbstractContextManager[Edited]:
        """All edits at once: the later ones are told as the earlier ones are."""
        return self.editor.edit(self.backbone, [*self.requests, *requests])


class InContext(Editor):
    """All edits before every prompt, in an order drawn from `seed` (InComeS, baselines).

    Args:
        seed: of the order.

    Raises:
        ValueError: where the edits alone fill the context window.
    """

    name = "icl"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        statements = list(dict.fromkeys(r.statement for r in requests))
        random.Random(self.seed).shuffle(statements)
        context = " ".join(statements) + "\n" if statements else ""
        room = getattr(backbone.model.config, "max_position_embeddings", None)
        used = len(backbone.tokenizer(context, add_special_tokens=False)["input_ids"])
        if room and used >= room:
            raise ValueError(f"icl: {len(statements)} edits are {used} tokens long, the context window has {room}")
        yield Told(self, backbone, requests, context)


class RightEdit(InContext):
    """Only the right edit before the prompt: what in-context learning would give if selection were perfect."""

    name = "icl_right_edit"
    own_edit_only = True
    reads_pool = False
