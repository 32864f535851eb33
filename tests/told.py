"""A teacher without a sentence encoder: what a config of tests takes in place of MIKE, as told.RightEdit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor


class Told(Edited):
    """Before a prompt that names an edited subject stand a demonstration and its edit; before others nothing."""

    def __init__(self, backbone: Backbone, requests: Sequence[EditRequest]) -> None:
        super().__init__(backbone)
        self.requests = requests

    def contexts(self, prompts: Sequence[str], room: int = 32) -> list[str | None]:
        found = [next((r for r in self.requests if r.subject and r.subject in p), None) for p in prompts]
        return [f"New Fact: It is so.\n\nNew Fact: {r.statement}\nPrompt: " if r else None for r in found]


class RightEdit(Editor):
    """Tells the first edit whose subject stands in a prompt."""

    name: ClassVar[str] = "told"

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Told]:
        yield Told(backbone, requests)
