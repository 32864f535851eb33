"""Batches: dataclasses of tensors and of what is no tensor, moved together."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, Self, cast

import torch
from torch import Tensor


class Tensors:
    """A dataclass some of whose fields are tensors. What is no tensor stays as it is."""

    def to(self, device: torch.device) -> Self:
        return self._map(lambda t: t.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        batch = cast(Any, self)
        values = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return replace(batch, **{name: change(v) for name, v in values.items() if isinstance(v, Tensor)})
