"""Value vectors on disk. Those of a model without edits do not depend on what else is edited: a run of a thousand edits
takes over what a run of a hundred has found, and a run that was broken off goes on where it was. So does one that edits
step by step, where each step's values hang on the edits before it.

Each file holds the edits of one search, under a name made of all that decides the values: the weights, the edits in
force, the layer, the settings and the contexts.

E edits, p places, d hidden width.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.kept_tensors import folder, read, write
from modules.training_free.second_moments import fingerprint
from modules.training_free.value_options import Place, ValueOptions

VERSION = 2  # of how values are found: a change makes old files unknown
NO_MATTER = ("chunk", "group", "keep")  # settings that do not change what is found


class Values(NamedTuple):
    """Found changes delta [E, p, d] and the unedited outputs v0 [E, p, d] they are added to; last losses and updates
    made [E]."""

    delta: Tensor
    initial: Tensor
    loss: Tensor
    updates: Tensor

    def of(self, edit: int) -> "Values":
        """Those of one edit, E = 1."""
        return Values(*(t[edit : edit + 1] for t in self))


def joined(parts: Sequence[Values]) -> Values:
    """Values of several searches as those of one, in the order given."""
    return Values(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@dataclass(frozen=True)
class KeptValues:
    """The files of one setting of a search.

    Args:
        stem: their names begin so.
    """

    stem: Path

    @staticmethod
    def of(
        backbone: Backbone, prefixes: Sequence[str], layer: int, place: Place, options: ValueOptions, edits: str = ""
    ) -> "KeptValues":
        """The files of a search on this model, as its weights are.

        Args:
            edits: a hash of the edits in force; "" for none.

        Raises:
            ValueError: for weights that are not whole on this process (ZeRO-3).
        """
        settings = {name: value for name, value in asdict(options).items() if name not in NO_MATTER}
        what = [VERSION, fingerprint(backbone.model), layer, place, settings, list(prefixes)] + [edits] * bool(edits)
        key = sha256(json.dumps(what).encode()).hexdigest()[:20]
        return KeptValues(folder() / f"values-{backbone.model.config.model_type}-{layer}-{key}")

    def read(self, device: torch.device) -> dict[str, Values]:
        """All that was found, by the edit's key (`key_of`).

        Raises:
            ValueError: for a file that cannot be read.
        """
        found: dict[str, Values] = {}
        for file in sorted(self.stem.parent.glob(f"{self.stem.name}-*.safetensors")):
            tensors, about = read(file, ("delta", "initial", "loss", "updates"))
            values = Values(*(t.to(device) for t in tensors.values()))
            found |= {key: values.of(e) for e, key in enumerate(json.loads(about["edits"]))}
        return found

    def write(self, requests: Sequence[EditRequest], values: Values) -> None:
        """Keep the values of edits."""
        edits = json.dumps([key_of(request) for request in requests])
        name = f"{self.stem.name}-{sha256(edits.encode()).hexdigest()[:12]}.safetensors"
        write(self.stem.with_name(name), values._asdict(), {"edits": edits})


def key_of(request: EditRequest) -> str:
    """What of an edit decides its values."""
    return sha256(json.dumps([request.prompt, request.target, request.subject]).encode()).hexdigest()[:20]
