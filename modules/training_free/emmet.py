"""EMMET: MEMIT's many edits under ROME's equality constraint, in one layer.

Paper: arXiv 2403.14236 (Gupta et al. 2024), section 3.
"""

from torch import Tensor

from modules.training_free.closed_form import Metric, solve
from modules.training_free.memit import MEMIT
from modules.training_free.second_moments import Moments
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions


class EMMET(MEMIT):
    """Equality-constrained mass editing: Delta = R (K' C^-1 K + alpha I)^-1 K' C^-1.

    Args:
        layer: the decoder layer, as a number or a part of the depth.
        alpha: lets the constraint give, where keys are nearly dependent. The factor that released settings put before C
            does the same: alpha and factor count by their product alone.
        alpha_for_one: also where there is one edit (EasyEdit); else one edit is ROME's (official code).
        values, contexts, moments: as of MEMIT.
    """

    name = "emmet"

    def __init__(
        self,
        layer: int | float = 0.25,
        alpha: float = 0.1,
        alpha_for_one: bool = False,
        values: ValueOptions | None = None,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
    ) -> None:
        super().__init__([layer], alpha, values, contexts, moments)
        self.alpha_for_one = alpha_for_one

    def factor(self, metric: Metric, keys: Tensor, earlier: Tensor | None) -> Tensor:
        exact = len(keys) == 1 and not self.alpha_for_one
        assert self.weight != "auto"
        return solve(metric, keys, 0.0 if exact else self.weight)
