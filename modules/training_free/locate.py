"""What editors that locate facts share: which layers, keys averaged over contexts, and edits as low-rank deltas.

n edits, f = d_in and d = d_out of a down projection.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Editor
from modules.evaluating import evaluating
from modules.fingerprint import tensors_hash
from modules.interventions import Deltas
from modules.training_free.held import Held
from modules.training_free.method_edited import MethodEdited
from modules.training_free.subject import Row, require_subjects, row, subject_states
from modules.training_free.templates import Contexts


def layer_numbers(backbone: Backbone, layers: Sequence[int | float]) -> list[int]:
    """Layers as numbers, in increasing order: given so (negative ones count from the last), or as parts of the depth.

    0.25 is layer 7 of 30 layers, 0 to 29. Layers that fall together in a model of few layers are one.

    Raises:
        ValueError: for a layer that the model does not have.
    """
    count = len(backbone.layers)
    found = [int(x * count + 1e-6) if 0 < x < 1 else int(x) for x in layers]
    wrong = [x for x, i in zip(layers, found, strict=True) if not -count <= i < count or (x != i and not 0 < x < 1)]
    if wrong or not found:
        raise ValueError(f"layers must be numbers from 0 to {count - 1}, or parts of the depth below 1, got {layers}")
    return sorted({i % count for i in found})


class LocatedEdited(MethodEdited):
    """A backbone with the edits of a method that locates facts."""

    editor: "LocateEditor"

    def state(self, found: Mapping[str, Deltas] | None = None) -> str:
        """A hash of all that is in force in this model's passes, and of what was `found` beyond it; "" for nothing."""
        each = {f"{i}.{name}": d for i, deltas in enumerate((self.deltas, found or {})) for name, d in deltas.items()}
        tensors = {f"{name}.{part}": getattr(d, part) for name, d in each.items() for part in d._fields}
        return tensors_hash(tensors) if tensors else ""

    def further(self, requests: Sequence[EditRequest]) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        require_subjects(self.editor.name, requests)
        with torch.no_grad(), evaluating(self.backbone.model):
            return self.editor.find(self, requests)


class LocateEditor(Editor):
    """An editor that writes into down projections.

    Args:
        layers: see `layer_numbers`.
        contexts: in which keys and values are taken.
    """

    edited: type[LocatedEdited] = LocatedEdited

    def __init__(self, layers: Sequence[int | float], contexts: Contexts) -> None:
        self.layers = list(layers)
        self.contexts = contexts

    def names(self, backbone: Backbone) -> list[str]:
        """The down projections that are edited."""
        stem, down = backbone.parts.layers, backbone.parts.down
        return [f"{stem}.{i}.{down}" for i in layer_numbers(backbone, self.layers)]

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[LocatedEdited]:
        require_subjects(self.name, requests)
        layer_numbers(backbone, self.layers)
        yield self.edited(self, backbone).add(requests)

    @abstractmethod
    def find(
        self, edited: LocatedEdited, requests: Sequence[EditRequest]
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        """See `DeltaEdited.further`."""

    def rows(self, backbone: Backbone, requests: Sequence[EditRequest]) -> list[Row]:
        """The prompts in all contexts, one edit after the other, the bare prompt first."""
        prefixes = self.contexts.draw(backbone)
        return [row(backbone, r.prompt, str(r.subject), prefix=prefix) for r in requests for prefix in prefixes]

    def keys(
        self, backbone: Backbone, rows: Sequence[Row], count: int, name: str, held: Held | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys of `count` edits under the edits that are on now [n, f]: averaged over contexts, and of the bare prompt.

        Args:
            rows: see `rows`.
            name: of the down projection.
            held: see `subject_states`.
        """
        found = subject_states(backbone, rows, [name], [], held=held)[name].unflatten(
            0, (count, -1)
        )  # [n, contexts, f]
        weights = self.contexts.weights(found.shape[1]).to(found)
        return torch.einsum("ncf,c->nf", found, weights), found[:, 0]


def deltas_of(a: Tensor, b: Tensor, precise: torch.dtype) -> Deltas:
    """Input factors [n, f] and output factors [n, d] as the deltas of n edits, in float32 or the model's precision."""
    wide = torch.promote_types(precise, torch.float32)
    return Deltas(a.to(wide), b.to(wide), torch.arange(len(a), device=a.device))


def down_name(backbone: Backbone, layer: int) -> str:
    """The down projection of a layer."""
    return f"{backbone.parts.layers}.{layer}.{backbone.parts.down}"


def layer_of(backbone: Backbone, name: str) -> int:
    """The number of the decoder layer that a module stands in, by its name."""
    return int(name.removeprefix(f"{backbone.parts.layers}.").partition(".")[0])
