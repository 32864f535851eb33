"""A backbone under the low-rank edits of a method that says which linear layers it changes."""

from collections.abc import Mapping, Sequence
from typing import Protocol, Self

from torch import Tensor

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.delta_edited import DeltaEdited
from modules.interventions import Deltas, shape


class Naming(Protocol):
    """A method that changes linear layers."""

    def names(self, backbone: Backbone) -> list[str]:
        """Those that it changes."""
        ...


class MethodEdited(DeltaEdited):
    """See `DeltaEdited`; subclasses say how further edits are made.

    Args:
        editor: the method.
    """

    def __init__(
        self,
        editor: Naming,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        deltas: Mapping[str, Deltas] | None = None,
        memory: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(backbone, requests, deltas, memory)
        self.editor = editor

    @property
    def method(self) -> str:
        return type(self.editor).__name__

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        return {name: shape(self.backbone.model, name) for name in self.editor.names(self.backbone)}

    def like(self, requests: Sequence[EditRequest], deltas: Mapping[str, Deltas], memory: Mapping[str, Tensor]) -> Self:
        return type(self)(self.editor, self.backbone, requests, deltas, memory)
