"""The metrics of layers (see `closed_form.py`), from their second moments."""

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from modules.backbone import Backbone
from modules.training_free.closed_form import Identity, Inverse, Metric, Projection
from modules.training_free.second_moments import (
    Moments,
    Progress,
    counted,
    fingerprint,
    null_space,
    read_moments,
    used_file,
)

# of each model: what its weights were known by, and its metrics by kind and layer. All editors have them in common: a
# factor in float64 has 2.9 GB for a layer of Qwen2.5-7B
_KNOWN: WeakKeyDictionary[nn.Module, tuple[str, dict[tuple[str, str], Metric]]] = WeakKeyDictionary()


def forget(model: nn.Module) -> None:
    """Give the memory of a model's metrics back; who asks for them again waits until they are made."""
    _KNOWN.pop(model, None)


class Metrics:
    """The metrics of layers of one model, made once and kept in memory while its weights stay the same."""

    def __init__(self, moments: Moments | None) -> None:
        self.moments = moments
        self.ranks: dict[str, int] = {}

    def inverse(self, backbone: Backbone, layers: Sequence[str], progress: Progress | None = None) -> list[Metric]:
        """C^-1 of each layer; the identity where no moments are wanted."""
        if self.moments is None:
            return [Identity() for _ in layers]
        known, kind = _known(backbone), f"inverse of {self.moments}"
        missing = [name for name in layers if (kind, name) not in known]
        for name, file in counted(backbone, missing, self.moments, progress or bar()).items():
            known[kind, name] = Inverse(read_moments(file, backbone.device), name)
        return [known[kind, name] for name in layers]

    def projection(self, backbone: Backbone, layers: Sequence[str], threshold: float, relative: bool) -> list[Metric]:
        """P of each layer; `ranks` tells how many directions it leaves."""
        moments = self.moments
        assert moments is not None
        known, kind = _known(backbone), f"projection of {moments} by {threshold}, relative {relative}"
        missing = [name for name in layers if (kind, name) not in known]
        files = {name: used_file(backbone, name, moments, threshold, relative) for name in missing}
        counted(backbone, [n for n, file in files.items() if not file.is_file()], moments, bar())  # of all in one go
        for name in missing:
            known[kind, name] = Projection(null_space(backbone, name, moments, threshold, relative)[0])
        found = [known[kind, name] for name in layers]
        self.ranks |= {n: p.rank for n, p in zip(layers, found, strict=True) if isinstance(p, Projection)}
        return found


def _known(backbone: Backbone) -> dict[tuple[str, str], Metric]:
    """What is known of a model with the weights that it has now, where it is now."""
    mark = f"{fingerprint(backbone.model)} on {backbone.device}"
    if _KNOWN.get(backbone.model, ("", {}))[0] != mark:
        _KNOWN[backbone.model] = mark, {}
    return _KNOWN[backbone.model][1]


def bar() -> Progress:
    """A progress bar in tokens, on standard error."""
    from tqdm.auto import tqdm

    shown: list[Any] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(tqdm(total=total, desc="second moments", unit=" tokens", unit_scale=True, leave=False))
        shown[0].update(done - shown[0].n)
        if done >= total:
            shown[0].close()

    return progress
