"""Models whose answers are written down, one token a letter, for the golden files of the protocols."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu")))
GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> dict[str, Any]:
    """A golden file, its records read."""
    content = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return content | {"records": [EditRecord.from_json(json.dumps(row)) for row in content["records"]]}


class Scripted(Edited):
    """Says `generated` to prompts, and is sure of `forced` after prompts; to others "???"."""

    def __init__(self, generated: Mapping[str, str], forced: Mapping[str, str]) -> None:
        self.generated, self.forced = generated, forced
        self.asked: list[str] = []

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        self.asked += prompts
        return [self.generated.get(prompt, "???") for prompt in prompts]

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        scores = []
        for prompt, target in zip(prompts, targets, strict=True):
            said = self.forced.get(prompt, "").ljust(len(target), "?")[: len(target)]
            letters = [torch.tensor([ord(c) for c in text]) for text in (said, target)]
            scores.append(TargetScore(torch.zeros(len(target)), *letters))
        return scores


class Told(Editor):
    """Says what is written down, whatever is edited; remembers the edits that it was asked for."""

    name = "told"

    def __init__(self, model: Scripted, own_edit_only: bool = False) -> None:
        self.model, self.own_edit_only = model, own_edit_only
        self.made: list[list[str]] = []

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        self.made.append([request.text or request.prompt for request in requests])
        yield self.model


def figures(evaluation: Any) -> dict[str, float]:
    return {name: cell["value"] for name, cell in evaluation.aggregates.items()}
