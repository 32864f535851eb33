"""A hypernetwork: gradient factors of edits in, edits out.

n tokens of all edits, w = d_in + d_out of a linear layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from modules.gradients import Factors
from modules.hypernetwork.statistics import RunningStatistics
from modules.interventions import Deltas


class Hypernetwork(nn.Module, ABC):
    """What MEND and IBKE have in common: factors are normalised by running statistics, and work is done in fp32.

    Args:
        shapes: (d_in, d_out) of each edited linear layer, by name.
        shared: layers of one shape share parameters and statistics; else each has its own.
        normalise: by the mean and variance of each feature over training; off: factors as they are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], shared: bool, normalise: bool = True) -> None:
        super().__init__()
        if not shapes:
            raise ValueError("a hypernetwork needs at least one linear layer to edit")
        self.shapes = dict(shapes)
        self.key = {n: f"{s[0]}x{s[1]}" if shared else n.replace(".", "_") for n, s in self.shapes.items()}
        widths = {self.key[n]: sum(s) for n, s in self.shapes.items()}
        self.statistics = nn.ModuleDict({k: RunningStatistics(w) for k, w in widths.items()} if normalise else {})

    def forward(
        self, factors: Mapping[str, Factors], seeds: Tensor | None = None
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        """The edits by layer, and terms of the training loss by name: of each edit [edits], weighted already.

        Args:
            seeds: one for each edit, for whatever training draws; None: nothing is drawn.
        """
        device = next(iter(factors.values())).h.device
        with torch.autocast(device.type, enabled=False):
            return self.transform(factors, seeds)

    @abstractmethod
    def transform(
        self, factors: Mapping[str, Factors], seeds: Tensor | None
    ) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        """What `forward` returns, outside of any autocast."""

    def rates(self) -> list[nn.Parameter]:
        """Parameters that are learned at a rate of their own: the step sizes of edits."""
        return []

    def normalised(self, name: str, factors: Factors) -> tuple[Tensor, Tensor]:
        """The tokens of a layer [n, w] in units of their running deviations, and the edit of each [n]."""
        s, edit = factors.tokens()
        return (self._statistics(name).normalise(s) if self.statistics else s), edit

    def observe(self, factors: Mapping[str, Factors]) -> None:
        """Let these tokens count in the statistics from the next `commit` on."""
        for name in factors if self.statistics else ():
            self._statistics(name).observe(factors[name].tokens()[0])

    def commit(self, ranks: bool = True) -> None:
        """Take in what was observed since the last time (see `RunningStatistics.commit`)."""
        for statistics in self.statistics.values():
            statistics.commit(ranks)  # type: ignore[operator]

    def _statistics(self, name: str) -> RunningStatistics:
        return self.statistics[self.key[name]]  # type: ignore[return-value]
