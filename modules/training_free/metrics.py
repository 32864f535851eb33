"""The metrics of layers (see `closed_form.py`), from their second moments."""

from collections.abc import Sequence
from typing import Any

from modules.backbone import Backbone
from modules.training_free.closed_form import Identity, Inverse, Metric, Projection
from modules.training_free.second_moments import Moments, Progress, fingerprint, null_space, second_moments


class Metrics:
    """The metrics of layers of one model, made once and kept in memory while its weights stay the same."""

    def __init__(self, moments: Moments | None) -> None:
        self.moments = moments
        self._known: dict[str, tuple[str, Metric]] = {}
        self.ranks: dict[str, int] = {}

    def inverse(self, backbone: Backbone, layers: Sequence[str], progress: Progress | None = None) -> list[Metric]:
        """C^-1 of each layer; the identity where no moments are wanted."""
        if self.moments is None:
            return [Identity() for _ in layers]
        mark, missing = self._missing(backbone, layers)
        if missing:
            found = second_moments(backbone, missing, self.moments, progress or bar())
            self._known |= {n: (mark, Inverse(c, n)) for n, c in found.items()}
        return [self._known[n][1] for n in layers]

    def projection(self, backbone: Backbone, layers: Sequence[str], threshold: float, relative: bool) -> list[Metric]:
        """P of each layer; `ranks` tells how many directions it leaves."""
        assert self.moments is not None
        mark, missing = self._missing(backbone, layers)
        if missing:
            second_moments(backbone, missing, self.moments, bar())  # of all layers in one go
        for name in missing:
            basis, self.ranks[name] = null_space(backbone, name, self.moments, threshold, relative)
            self._known[name] = (mark, Projection(basis))
        return [self._known[n][1] for n in layers]

    def _missing(self, backbone: Backbone, layers: Sequence[str]) -> tuple[str, list[str]]:
        """What a model is known by, and the layers whose metrics are not those of that model."""
        mark = f"{fingerprint(backbone.model)} on {backbone.device}"
        return mark, [n for n in layers if self._known.get(n, ("", None))[0] != mark]


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
