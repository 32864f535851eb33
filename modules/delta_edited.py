"""A backbone under low-rank edits, whoever made them: consecutive edits, removal, saving, and merging into weights.

Every edit has its own rows in each layer's deltas, and in what its method remembers of it, so a single one can be
taken out again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import Deltas, LowRank, low_rank, merged
from modules.saved_edits import kept_without, left_to_make, read_edits, write_edits
from modules.summed import Summed

MEMORY = "memory."  # before the names of remembered tensors in a file


class DeltaEdited(Edited):
    """A backbone with deltas, which are there in its own passes alone. Subclasses say how further edits are made.

    Args:
        requests, deltas: the edits and what they add to each layer; edit i is requests[i].
        memory: what the method remembers of its edits, by name; one row [n, ...] for each edit.
    """

    def __init__(
        self,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        deltas: Mapping[str, Deltas] | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.requests = tuple(requests)
        self.memory = dict(memory or {})
        # each after so many edits
        self._parts: list[tuple[int, Mapping[str, Deltas]]] = [(0, deltas)] if deltas else []

    @property
    def deltas(self) -> Mapping[str, Deltas]:
        """What the edits add to each layer, by the layer's name; edit i is requests[i]."""
        if [count for count, _ in self._parts] != [0]:  # put together when asked for: adding must not copy all there is
            joined: dict[str, list[Deltas]] = {}
            for count, part in self._parts:
                for name, d in part.items():
                    joined.setdefault(name, []).append(d._replace(edit=d.edit + count))
            deltas = {name: Deltas(*map(torch.cat, zip(*of, strict=True))) for name, of in joined.items()}
            self._parts = [(0, deltas)]
        return self._parts[0][1]

    @cached_property
    def terms(self) -> dict[str, Summed]:
        """The sum of the edits, by the linear layer's name."""
        with torch.inference_mode(False):  # the gradient of a further edit goes through it
            return {name: Summed.of(d) for name, d in self.deltas.items()}

    @property
    def shares_prefixes(self) -> bool:
        return type(self).decode is DeltaEdited.decode

    @property
    def method(self) -> str:
        """Whose edits these are: what the method remembers of them is of no use to another."""
        raise NotImplementedError

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """(d_in, d_out) of the layers that this method edits in this backbone, by name."""
        raise NotImplementedError

    def like(self, requests: Sequence[EditRequest], deltas: Mapping[str, Deltas], memory: Mapping[str, Tensor]) -> Self:
        """The same method and backbone with these edits in place of its own."""
        raise NotImplementedError

    def further(self, requests: Sequence[EditRequest]) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        """What new edits, none of which is there already, add to each layer, and what to remember of them.

        Raises:
            ValueError: for requests that the method cannot serve, before any work.
        """
        raise NotImplementedError

    def applied(self) -> AbstractContextManager[None]:
        """The backbone's own modules under these edits, for the length of a `with`."""
        return low_rank(self.backbone.model, self.terms)

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        with self.applied():
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator[Self]:
        """The same with more edits, made at the model as it is edited now; what is in force is not repeated.

        Raises:
            ValueError: for requests that the method cannot serve, before any work.
        """
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> Self:
        """See `edit`."""
        new = left_to_make(requests, self.requests)
        return self.joined(new, *(self.further(new) if new else ({}, {})))

    def joined(
        self, requests: Sequence[EditRequest], deltas: Mapping[str, Deltas], memory: Mapping[str, Tensor]
    ) -> Self:
        """The same with these edits after its own."""
        memory = {n: torch.cat([self.memory[n], m]) if n in self.memory else m for n, m in memory.items()}
        made = self.like([*self.requests, *requests], {}, self.memory | memory)
        made._parts = [*self._parts, *([(len(self.requests), deltas)] if deltas else [])]
        with torch.inference_mode(False):  # see `terms`
            sums = {n: self.terms[n].then(d) if n in self.terms else Summed.of(d) for n, d in deltas.items()}
        made.terms = self.terms | sums
        return made

    def remove(self, requests: Sequence[EditRequest]) -> Self:
        """The same without these edits. What later edits found at the model that had them stays as it was found.

        Raises:
            ValueError: for an edit that was not made.
        """
        rows = kept_without(self.requests, requests)
        kept = torch.tensor(rows, dtype=torch.long, device=self.backbone.device)
        deltas = {name: d.keep(kept) for name, d in self.deltas.items()}
        memory = {name: m[kept.to(m.device)] for name, m in self.memory.items()}
        return self.like([self.requests[i] for i in rows], deltas, memory)

    def weight_changes(self) -> Mapping[str, LowRank | Tensor]:
        return {name: term.change() for name, term in self.terms.items()}

    def merge(self) -> PreTrainedModel:
        """A plain model with the edits in its weights, in the backbone's precision; the backbone stays as it is."""
        return merged(self.backbone.model, self.weight_changes())

    def save(self, folder: Path) -> None:
        """Write deltas.safetensors and edits.json (the edits as text) to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        flat = {f"{name}.{part}": getattr(d, part) for name, d in self.deltas.items() for part in d._fields}
        flat |= {MEMORY + name: m for name, m in self.memory.items()}
        tensors = {name: t.cpu().contiguous() for name, t in flat.items()}
        save_file(tensors, folder / "deltas.safetensors", {"method": self.method})
        write_edits(folder, self.requests)

    def restored(self, folder: Path) -> Self:
        """The same method and backbone with the edits that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or those of another method or model.
        """
        requests = read_edits(folder, "deltas.safetensors")
        try:
            with safe_open(folder / "deltas.safetensors", "pt", device=str(self.backbone.device)) as file:
                wrote = (file.metadata() or {}).get("method")
                flat = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"{folder / 'deltas.safetensors'} cannot be read: {error}; make its edits again"
            ) from error
        if wrote not in (None, self.method):  # deltas alone, as DistillMIKE keeps them, name none
            raise ValueError(f"the edits in {folder} were made by {wrote}, not by {self.method}; make them again")
        memory = {n.removeprefix(MEMORY): t for n, t in flat.items() if n.startswith(MEMORY)}
        flat = {n: t for n, t in flat.items() if not n.startswith(MEMORY)}
        shapes = self.shapes
        if flat and set(flat) != {f"{name}.{part}" for name in shapes for part in Deltas._fields}:
            raise ValueError(f"the edits in {folder} are of other layers; make them again")
        deltas = {name: Deltas(*(flat[f"{name}.{p}"] for p in Deltas._fields)) for name in shapes if flat}
        for name, d in deltas.items():
            if (d.a.shape[1], d.b.shape[1]) != shapes[name]:
                raise ValueError(f"the edits in {folder} are of a model of another size; make them again")
            if len(d.edit) and int(d.edit.max()) >= len(requests):
                raise ValueError(f"{folder}: edits.json lists {len(requests)} edits, deltas.safetensors holds more")
        wrong = [name for name, m in memory.items() if len(m) != len(requests)]
        if wrong:
            raise ValueError(f"{folder}: edits.json lists {len(requests)} edits, {wrong[0]!r} is of another number")
        return self.like(requests, deltas, memory)
