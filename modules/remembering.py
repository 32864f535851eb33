"""Editors whose edits are a memory and nothing else: the backbone itself never changes."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Self, cast

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.memory import EditMemory, Encoder, EncoderConfig, SentenceEncoder


class MemoryEditor(Editor):
    """An editor that does its work at each query, from a memory of edits.

    Attributes:
        encoder: finds what is near in meaning.
    """

    encoder: EncoderConfig

    @cached_property
    def sentences(self) -> Encoder:
        """The sentence encoder; one for all memories of this editor."""
        return cast(Encoder, SentenceEncoder(self.encoder))

    @abstractmethod
    def unedited(self, backbone: Backbone) -> "Remembering":
        """A backbone with an empty memory.

        Raises:
            ValueError: for a backbone that the method cannot serve.
        """

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Refuse what the method cannot serve.

        Raises:
            ValueError: naming the edit.
        """

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["Remembering"]:
        """See `Editor.edit`. Of two edits that give one prompt different targets, the later one stands."""
        yield self.unedited(backbone).add(requests)


class Remembering(Edited):
    """A backbone beside a memory of edits, which is all the state there is.

    Args:
        editor: the method, which further edits are made by.
    """

    reads_prompts = True

    def __init__(self, editor: MemoryEditor, backbone: Backbone, memory: EditMemory, context: str = "") -> None:
        super().__init__(backbone, context=context)
        self.editor = editor
        self.memory = memory

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The edits in the memory."""
        return self.memory.requests

    def like(self, memory: EditMemory) -> Self:
        """The same method and backbone with another memory."""
        return type(self)(self.editor, self.backbone, memory)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator[Self]:
        """The same with more edits."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> Self:
        """See `edit`."""
        self.editor.check(requests)
        memory = self.memory.copy()
        memory.add(requests)
        return self.like(memory)

    def remove(self, requests: Sequence[EditRequest]) -> Self:
        """The same without these edits.

        Raises:
            ValueError: for an edit that was not made.
        """
        memory = self.memory.copy()
        memory.remove(requests)
        return self.like(memory)

    def save(self, folder: Path) -> None:
        """Write the memory to a folder, from which any editor with a memory can go on."""
        self.memory.save(folder)

    def restored(self, folder: Path) -> Self:
        """The same method and backbone with the memory that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or one that this method cannot serve.
        """
        memory = EditMemory.load(folder, self.memory.encoder)
        self.editor.check(memory.requests)
        return self.like(memory)
