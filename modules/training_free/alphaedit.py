"""AlphaEdit: MEMIT's edits, projected on what ordinary inputs hardly use, with all earlier edits kept.

Paper: arXiv 2410.02355 (Fang et al., ICLR 2025), section 3.
"""

from collections.abc import Sequence

from torch import Tensor

from modules.backbone import Backbone
from modules.training_free.closed_form import Metric, solve
from modules.training_free.memit import LAYERS, MEMIT
from modules.training_free.second_moments import Moments
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions


class AlphaEdit(MEMIT):
    """Null-space constrained editing: (P (K K' + K_p K_p') + L2 I) X = P K R', K_p the keys of all earlier edits.

    Args:
        layers, values, contexts, moments: as of MEMIT.
        l2: of the regularisation. 10 as released; EasyEdit has 1 for Llama-3-8B.
        threshold: eigenvalues of the second moments below it are free for edits.
        relative: threshold is in units of the mean eigenvalue. The published .02 is not: what it leaves differs from
            model to model (`metrics.ranks` tells, after an edit).
    """

    name = "alphaedit"

    def __init__(
        self,
        layers: Sequence[int | float] = LAYERS,
        l2: float = 10.0,
        threshold: float = 0.02,
        relative: bool = False,
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
    ) -> None:
        super().__init__(layers, l2, values or ValueOptions(lr=0.1), contexts, moments)
        if l2 <= 0 or threshold <= 0:
            raise ValueError(f"l2 and threshold must be positive, got {l2}, {threshold}")
        self.l2 = l2
        self.threshold, self.relative = threshold, relative

    def metric(self, backbone: Backbone, names: Sequence[str]) -> list[Metric]:
        return self.metrics.projection(backbone, names, self.threshold, self.relative)

    def factor(self, metric: Metric, keys: Tensor, earlier: Tensor | None) -> Tensor:
        return solve(metric, keys, self.l2, earlier)

    def remember(self, keys: dict[str, Tensor]) -> dict[str, Tensor]:
        return keys
