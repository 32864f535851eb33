"""A sentence encoder without weights, and training edits to show: for tests of editors that keep a memory."""

import re
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.sources import Source


class BagOfWords:
    """The cosine of two texts is the share of words that they have in common. `texts` holds what was encoded."""

    name = "bag of words"
    width = 512

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        self.texts += texts
        vectors = torch.zeros(len(texts), self.width)
        for row, text in zip(vectors, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[crc32(word.encode()) % self.width] += 1
        return torch.nn.functional.normalize(vectors, dim=-1)


def training_edit(subject: str, relation: str = "is in", target: str = "Peru", **changes: object) -> EditRecord:
    """A record of one rephrase and one neighbour."""
    fields = {
        "id": f"train/{subject} {relation}",
        "requests": (EditRequest(f"{subject} {relation}", target, subject),),
        "rephrases": (Query(f"They say {subject} {relation}", (target,)),),
        "locality": {"near": (Query(f"Next to {subject} lies", ("Chile",)),)},
    }
    return EditRecord(**(fields | changes))  # type: ignore[arg-type]


def written(file: Path, records: Sequence[EditRecord]) -> list[Source]:
    """Records as a source of demonstrations."""
    file.write_text("\n".join(record.to_json() for record in records), encoding="utf-8")
    return [Source("records", str(file))]
