"""The pool: what is kept of the edits. N edits, K key-value heads, D head width, d hidden width."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerGists:
    """One layer's gists: keys and values [N, K, D]."""

    keys: Tensor
    values: Tensor

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True)
class GistPool:
    """Gists by layer, and the edits' addresses [N, d] where selection goes by address. A pool is never changed: adding
    and removing give another one."""

    layers: Mapping[int, LayerGists] = field(default_factory=dict)
    address: Tensor | None = None

    def __len__(self) -> int:
        return len(next(iter(self.layers.values()))) if self.layers else 0

    def map(self, change: Callable[[Tensor], Tensor]) -> "GistPool":
        """The same pool with every tensor changed: moved, cut, cast."""
        layers = {i: LayerGists(change(g.keys), change(g.values)) for i, g in self.layers.items()}
        return GistPool(layers, None if self.address is None else change(self.address))

    def keep(self, rows: Sequence[int]) -> "GistPool":
        """The gists at these places, in this order."""
        at = torch.tensor(list(rows), dtype=torch.long)
        return self.map(lambda t: t[at.to(t.device)])

    @staticmethod
    def join(pools: Sequence["GistPool"]) -> "GistPool":
        """One pool after the other; empty ones are passed over."""
        pools = [p for p in pools if len(p)]
        if len(pools) < 2:
            return pools[0] if pools else GistPool()
        layers = {
            i: LayerGists(torch.cat([p.layers[i].keys for p in pools]), torch.cat([p.layers[i].values for p in pools]))
            for i in pools[0].layers
        }
        addresses = [p.address for p in pools if p.address is not None]
        return GistPool(layers, torch.cat(addresses) if addresses else None)

    def tensors(self) -> dict[str, Tensor]:
        """Flat names to tensors, for a safetensors file."""
        flat = {f"layers.{i}.{n}": getattr(g, n) for i, g in self.layers.items() for n in ("keys", "values")}
        if self.address is not None:
            flat["address"] = self.address
        return {name: t.contiguous() for name, t in flat.items()}

    @classmethod
    def from_tensors(cls, flat: Mapping[str, Tensor]) -> "GistPool":
        """The inverse of `tensors`."""
        indices = sorted({int(name.split(".")[1]) for name in flat if name.startswith("layers.")})
        layers = {i: LayerGists(flat[f"layers.{i}.keys"], flat[f"layers.{i}.values"]) for i in indices}
        return cls(layers, flat.get("address"))
