"""A trained hypernetwork as an editor: requests become deltas, and every pass of the model adds them.

Edits of one call are made together: each from the gradient at the model as it was before, and their deltas add up.
Further edits are made from the gradient at the edited model.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from datamodules.records import EditRequest
from modules import delta_edited
from modules.backbone import Backbone
from modules.editor import TrainedEditor
from modules.evaluating import evaluating
from modules.gradients import gradient_factors
from modules.hypernetwork.batch import encode_edit, padded
from modules.hypernetwork.network import Hypernetwork
from modules.interventions import Deltas, shape

CHUNK = 32  # edits of one forward and backward pass


class DeltaModel(nn.Module):
    """A hypernetwork beside the model that it edits. That model is frozen and no part of this module: it is neither
    trained nor saved with it, and is not cast to the precision of the training."""

    def __init__(self, backbone: Backbone, network: Hypernetwork) -> None:
        super().__init__()
        self.backbone = backbone
        self.network = network

    @property
    def reader(self) -> Backbone:
        """The model that answers."""
        return self.backbone

    @property
    def names(self) -> list[str]:
        """The linear layers that are edited."""
        return list(self.network.shapes)


class DeltaEdited(delta_edited.DeltaEdited):
    """A backbone with deltas that a hypernetwork made of gradients."""

    def __init__(
        self,
        model: DeltaModel,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        deltas: Mapping[str, Deltas] | None = None,
    ) -> None:
        super().__init__(backbone, requests, deltas)
        self.model = model

    @property
    def method(self) -> str:
        return "hypernetwork"

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return self.model.network.shapes

    def like(
        self, requests: Sequence[EditRequest], deltas: Mapping[str, Deltas], memory: Mapping[str, Tensor]
    ) -> "DeltaEdited":
        return DeltaEdited(self.model, self.backbone, requests, deltas)

    def further(self, requests: Sequence[EditRequest]) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        """See `delta_edited.DeltaEdited.further`.

        Raises:
            ValueError: for an edit without a token to predict, or one too long for the context window.
        """
        rows = [encode_edit(self.backbone.tokenizer, request) for request in requests]
        for row, request in zip(rows, requests, strict=True):
            self._check_room(len(row.ids))
            if row.start >= len(row.ids):
                raise ValueError(f"an edit of one token has nothing to predict: {request.statement!r}")
        made: list[dict[str, Deltas]] = []
        for at in range(0, len(rows), CHUNK):
            ids, mask, answer = padded(self.backbone.tokenizer, rows[at : at + CHUNK])
            given = ids.to(self.backbone.device), mask.to(self.backbone.device), answer.to(self.backbone.device)
            # not in inference mode: the gradient of a further edit goes through these deltas
            with torch.inference_mode(False), torch.no_grad(), self.applied():
                factors, _ = gradient_factors(self.backbone, self.model.names, *given)
                found, _ = self.model.network(factors)
            made.append(found)
        # once for all: one after the other would copy all that is there for every 32 edits
        names = made[0] if made else ()
        with torch.inference_mode(False):
            return {name: Deltas.joined([part[name] for part in made], CHUNK) for name in names}, {}

    @classmethod
    def load(cls, model: DeltaModel, folder: Path) -> "DeltaEdited":
        """Read edits that `save` wrote, on the model's own backbone (see `restored`)."""
        return cls(model, model.backbone).restored(folder)


class DeltaEditor(TrainedEditor):
    """The editor of a trained hypernetwork. It edits any model that has the layers it was trained for.

    Args:
        name: the method's.
    """

    def __init__(self, model: DeltaModel, name: str) -> None:
        self.model = model
        self.name = name

    @property
    def reader(self) -> Backbone:
        return self.model.reader

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.model.backbone.model.to(device)  # type: ignore[arg-type]

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[DeltaEdited]:
        own = self.model.backbone
        if backbone.model.config.model_type != own.model.config.model_type or any(
            shape(backbone.model, name) != size for name, size in self.model.network.shapes.items()
        ):
            raise ValueError(
                f"this editor was trained on {own.config.source!r} ({own.model.config.model_type}); it cannot edit "
                f"{backbone.config.source!r} ({backbone.model.config.model_type})"
            )
        with evaluating(self.model):
            yield DeltaEdited(self.model, backbone).add(requests)
