"""What moves a batch, and what stays."""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.tensors import Tensors


@dataclass
class Made(Tensors):
    ids: Tensor
    count: int
    records: list[str]


def test_tensors_move_and_nothing_else() -> None:
    batch = Made(torch.arange(3), 2, ["a"])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Made)
    assert (moved.ids.device.type, moved.ids.shape) == ("meta", (3,))
    assert (moved.count, moved.records) == (2, ["a"])
    assert batch.ids.device.type == "cpu"
