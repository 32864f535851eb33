"""A trained hypernetwork as an editor: requests become deltas, and every pass of the model adds them.

Edits of one call are made together: each from the gradient at the model as it was before, and their deltas add up.
Further edits are made from the gradient at the edited model.
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.gradients import gradient_factors
from modules.hypernetwork.batch import encode_edit, padded
from modules.hypernetwork.network import Hypernetwork
from modules.interventions import Deltas, low_rank, merge, shape

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


class DeltaEdited(Edited):
    """A backbone with deltas, which are there in its own passes alone.

    Args:
        requests, deltas: the edits and what they add to each layer; edit i is requests[i].
    """

    def __init__(
        self,
        model: DeltaModel,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        deltas: dict[str, Deltas] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.model = model
        self.requests = tuple(requests)
        self.deltas = deltas or {}
        one = torch.zeros(len(self.requests), dtype=torch.long, device=backbone.device)
        self.terms = {name: d.term(1, one).compact() for name, d in self.deltas.items()}

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        with low_rank(self.backbone.model, self.terms):
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["DeltaEdited"]:
        """The same with more edits, made at the model as it is edited now; one that is there already is not repeated.

        Raises:
            ValueError: for an edit without a token to predict, or one too long for the context window.
        """
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> "DeltaEdited":
        """See `edit`."""
        known = {r.statement for r in self.requests}
        new = [r for r in {r.statement: r for r in requests}.values() if r.statement not in known]
        rows = [encode_edit(self.backbone.tokenizer, request) for request in new]
        for row, request in zip(rows, new, strict=True):
            self._check_room(len(row.ids))
            if row.start >= len(row.ids):
                raise ValueError(f"an edit of one token has nothing to predict: {request.statement!r}")
        deltas, count = self.deltas, len(self.requests)
        for at in range(0, len(rows), CHUNK):
            ids, mask, answer = padded(self.backbone.tokenizer, rows[at : at + CHUNK])
            given = ids.to(self.backbone.device), mask.to(self.backbone.device), answer.to(self.backbone.device)
            # not in inference mode: the gradient of a further edit goes through these deltas
            with torch.inference_mode(False), torch.no_grad(), low_rank(self.backbone.model, self.terms):
                factors, _ = gradient_factors(self.backbone, self.model.names, *given)
                found, _ = self.model.network(factors)
            deltas = {name: deltas[name].then(d, count + at) for name, d in found.items()} if deltas else found
        return DeltaEdited(self.model, self.backbone, [*self.requests, *new], deltas)

    def remove(self, requests: Sequence[EditRequest]) -> "DeltaEdited":
        """The same without these edits. What later edits found at the model that had them stays as it was found.

        Raises:
            ValueError: for an edit that was not made.
        """
        gone = {r.statement for r in requests}
        missing = gone - {r.statement for r in self.requests}
        if missing:
            raise ValueError(f"not among the edits, so it cannot be removed: {sorted(missing)[0]!r}")
        rows = [i for i, r in enumerate(self.requests) if r.statement not in gone]
        kept = torch.tensor(rows, dtype=torch.long, device=self.backbone.device)
        deltas = {name: d.keep(kept) for name, d in self.deltas.items()}
        return DeltaEdited(self.model, self.backbone, [self.requests[i] for i in rows], deltas)

    def merge(self) -> PreTrainedModel:
        """A plain model with the edits in its weights, in the backbone's precision; the backbone stays as it is."""
        model = copy.deepcopy(self.backbone.model)
        merge(model, self.terms)
        return model

    def save(self, folder: Path) -> None:
        """Write deltas.safetensors and edits.json (the edits as text) to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        flat = {f"{name}.{part}": getattr(d, part) for name, d in self.deltas.items() for part in d._fields}
        save_file({name: t.cpu().contiguous() for name, t in flat.items()}, folder / "deltas.safetensors")
        lines = [asdict(r) for r in self.requests]
        (folder / "edits.json").write_text(json.dumps(lines, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, model: DeltaModel, folder: Path) -> "DeltaEdited":
        """Read edits that `save` wrote, on the model's own backbone.

        Raises:
            ValueError: where the folder holds none, or those of another model.
        """
        for name in ("deltas.safetensors", "edits.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no {name}; give a folder that an edited model was saved to")
        requests = [EditRequest(**r) for r in json.loads((folder / "edits.json").read_text(encoding="utf-8"))]
        try:
            flat = load_file(folder / "deltas.safetensors", device=str(model.backbone.device))
        except SafetensorError as error:
            raise ValueError(
                f"{folder / 'deltas.safetensors'} cannot be read: {error}; make its edits again"
            ) from error
        if flat and set(flat) != {f"{name}.{part}" for name in model.names for part in Deltas._fields}:
            raise ValueError(f"the edits in {folder} are of other layers; make them again")
        deltas = {name: Deltas(*(flat[f"{name}.{p}"] for p in Deltas._fields)) for name in model.names if flat}
        for name, d in deltas.items():
            if (d.a.shape[1], d.b.shape[1]) != model.network.shapes[name]:
                raise ValueError(f"the edits in {folder} are of a model of another size; make them again")
            if len(d.edit) and int(d.edit.max()) >= len(requests):
                raise ValueError(f"{folder}: edits.json lists {len(requests)} edits, deltas.safetensors holds more")
        return cls(model, model.backbone, requests, deltas)


class DeltaEditor(Editor):
    """The editor of a trained hypernetwork. It edits any model that has the layers it was trained for.

    Args:
        name: the method's.
    """

    def __init__(self, model: DeltaModel, name: str) -> None:
        self.model = model
        self.name = name

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
        training = [m for m in self.model.modules() if m.training]
        self.model.eval()
        try:
            yield DeltaEdited(self.model, backbone).add(requests)
        finally:
            for module in training:
                module.training = True
