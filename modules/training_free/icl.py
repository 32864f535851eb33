"""In-context learning: the edits as text before the prompt (ICE, the paper's baseline), and the model left alone."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor


class Unedited(Editor):
    """The model as it is: the floor of every comparison, and the reference for locality."""

    name = "unedited"
    reads_pool = False

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        yield Edited(backbone)


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
        yield Edited(backbone, context=context)


class RightEdit(InContext):
    """Only the right edit before the prompt: what in-context learning would give if selection were perfect."""

    name = "icl_right_edit"
    own_edit_only = True
    reads_pool = False
