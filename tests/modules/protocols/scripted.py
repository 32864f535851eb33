"""Models whose answers are written down, one token a letter, for the golden files of the protocols."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.byte_tokenizer import byte_tokenizer
from modules.editor import Edited, Editor, TargetScore

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu"), tokenizer=byte_tokenizer()))
GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name: str) -> dict[str, Any]:
    """A golden file, its records read."""
    content = json.loads((GOLDEN / name).read_text(encoding="utf-8"))
    return content | {"records": [EditRecord.from_json(json.dumps(row)) for row in content["records"]]}


class Scripted(Edited):
    """Says what is written down.

    Args:
        generated: by prompt; to others "???".
        forced: by prompt the text that it is sure of, or up to five, the likeliest first; else "???".
        probabilities: by prompt and target, of each token of the target, which need not be letters then.
    """

    def __init__(
        self,
        generated: Mapping[str, str],
        forced: Mapping[str, str | Sequence[str]],
        probabilities: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
    ) -> None:
        self.backbone, self.context = BACKBONE, ""
        self.generated, self.forced, self.probabilities = generated, forced, probabilities
        self.asked: list[str] = []
        self.scored: list[tuple[str, str]] = []

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        self.asked += prompts
        return [self.generated.get(prompt, "???") for prompt in prompts]

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        pairs = list(zip(prompts, targets, strict=True))
        self.scored += pairs
        return [self._score_one(prompt, target, top_k) for prompt, target in pairs]

    def _score_one(self, prompt: str, target: str, top_k: int) -> TargetScore:
        if self.probabilities is not None:
            log_probs = torch.tensor(self.probabilities[prompt][target]).log()
            return TargetScore(log_probs, torch.zeros(len(log_probs)), torch.zeros(len(log_probs)))
        said = self.forced.get(prompt, ())
        texts = [*([said] if isinstance(said, str) else said), "", "", "", "", ""][:5]
        top = torch.stack([_letters(text.ljust(len(target), "?")[: len(target)]) for text in texts], 1)  # [n, 5]
        return TargetScore(torch.zeros(len(target)), top[:, 0], _letters(target), top[:, :top_k])


def _letters(text: str) -> Tensor:
    return torch.tensor(BACKBONE.tokenizer(text)["input_ids"], dtype=torch.long)


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
