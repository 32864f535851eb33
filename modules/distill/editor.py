"""One set of edits in a model's adapters, as an editor: it puts these edits in force, and knows no others."""

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.records import EditRequest
from modules.backbone import Backbone, adapters_off
from modules.distill.start import moved, placed
from modules.editor import Edited, TrainedEditor
from modules.interventions import LowRank, low_rank, merged, shape
from modules.summed import Summed


class Distilled(Edited):
    """A backbone with the distilled edits, all of them, which are there in its own passes alone; or with none.

    Args:
        requests: those that were asked for. The others are in force with them: adapters cannot be taken apart.
    """

    def __init__(self, editor: "DistilledEditor", backbone: Backbone, requests: Sequence[EditRequest] = ()) -> None:
        super().__init__(backbone)
        self.editor = editor
        self.requests = tuple(requests)
        self.terms = moved(editor.terms, backbone.device) if requests else {}

    @property
    def shares_prefixes(self) -> bool:
        return True

    def decode(self, ids: Any, mask: Any, state: Any = None, **options: Any) -> tuple[Any, Any]:
        model = self.backbone.model  # in training it has the adapters themselves
        with adapters_off(model), low_rank(model, placed(model, self.terms)):
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["Distilled"]:
        """The same with more of the distilled edits asked for.

        Raises:
            ValueError: for one that was not distilled.
        """
        self.editor.check(requests)
        yield Distilled(self.editor, self.backbone, list(dict.fromkeys([*self.requests, *requests])))

    def weight_changes(self) -> Mapping[str, LowRank | Tensor]:
        """Start and adapters together, by the linear layer's name."""
        return {name: t.change() for name, t in self.terms.items()}

    def merge(self) -> PreTrainedModel:
        """A plain model with the edits in its weights, in the backbone's precision; the backbone stays as it is."""
        return merged(self.backbone.model, self.weight_changes())


class DistilledEditor(TrainedEditor):
    """The edits that were distilled, for the model they were distilled into, or another of its shape.

    Args:
        backbone: that model.
        distilled: the edits.
        terms: what they add to each layer.
    """

    name = "distillmike"
    reads_pool = False  # all edits are in force, whichever are asked for

    def __init__(self, backbone: Backbone, distilled: Sequence[EditRequest], terms: Mapping[str, Summed]) -> None:
        self.backbone = backbone
        self.distilled = tuple(distilled)
        self.terms = dict(terms)

    @property
    def reader(self) -> Backbone:
        return self.backbone

    def to(self, device: torch.device) -> None:
        self.backbone.model.to(device)  # type: ignore[arg-type]
        self.terms = moved(self.terms, device)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Refuse requests that were not distilled.

        Raises:
            ValueError: naming one, and how many there are.
        """
        if problem := unknown_among(requests, self._known):
            raise ValueError(f"{problem}: this editor knows only the edits it was trained on (data.train)")

    @cached_property
    def _known(self) -> set[str]:
        return {r.statement for r in self.distilled}

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Distilled]:
        self.check(requests)
        if not self._fits(backbone):
            own = self.backbone
            raise ValueError(
                f"this editor was trained on {own.config.source!r} ({own.model.config.model_type}); it cannot edit "
                f"{backbone.config.source!r} ({backbone.model.config.model_type})"
            )
        yield Distilled(self, backbone, requests)

    def _fits(self, backbone: Backbone) -> bool:
        model = backbone.model
        if model.config.model_type != self.backbone.model.config.model_type:
            return False
        try:
            places = placed(model, self.terms)
        except AttributeError:  # a model of fewer layers
            return False
        return all(shape(model, name) == t.shape for name, t in places.items())


def unknown_among(requests: Sequence[EditRequest], known: Set[str]) -> str:
    """What to say of requests that are not among the distilled ones, of these statements; nothing where all are."""
    unknown = [r.statement for r in requests if r.statement not in known]
    if not unknown:
        return ""
    return f"{len(unknown)} of {len(requests)} edits are not among the {len(known)} distilled, such as {unknown[0]!r}"
