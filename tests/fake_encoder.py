"""A sentence encoder that costs nothing: texts that share letters are near."""

from collections.abc import Sequence
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor


class FakeEncoder:
    """Counts of three letters in a row, hashed.

    Attributes:
        asked: the texts of each call.
    """

    def __init__(self, name: str = "fake", width: int = 64) -> None:
        self.name = name
        self.width = width
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if texts:
            self.asked.append(list(texts))
        vectors = torch.full((len(texts), self.width), 0.01)
        for row, text in enumerate(texts):
            padded = f"  {text.lower()}  "
            for at in range(len(padded) - 2):
                vectors[row, crc32(padded[at : at + 3].encode()) % self.width] += 1
        return F.normalize(vectors, dim=-1)
