"""What the dry run has to be told about a kind of module; all else it finds out by running a step of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import lightning as L
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainers.estimate.shape import shape_of

if TYPE_CHECKING:
    from trainers.estimate.plan import Plan
    from trainers.estimate.totals import Estimate
    from trainers.estimate.weightless import Weightless

MODEL = "--model.init_args."
LEAST_CHUNK = 256  # tokens; with fewer, logits are no longer what needs memory


class Family(ABC):
    """Modules that train alike. It knows no plan and holds nothing: its methods take a module, built where they say so.

    Args:
        kind: the class that all of them are.
        frozen_name: what their frozen language model is for.
    """

    kind: ClassVar[type[L.LightningModule]]
    frozen_name: ClassVar[str]

    @abstractmethod
    def settings(self, module: Any) -> tuple[Any, ...]:
        """All that decides what a step of a micro-batch holds, apart from the plan."""

    @abstractmethod
    def what(self, module: Any) -> object:
        """What it trains, for comparison: a change of it is a change of the result."""

    def shape(self, module: Any) -> None:
        """Put the shapes of the module's language models in the place of their sources, before it is built.

        Raises:
            ValueError: where a shape cannot be had.
        """
        module.backbone_config = shape_of(module.backbone_config)

    # ------------------------------------------------------------------ of a module that is built

    @abstractmethod
    def trained(self, module: Any) -> nn.Module:
        """What is trained and shared out, with the frozen parameters in it."""

    @abstractmethod
    def frozen(self, module: Any) -> PreTrainedModel | None:
        """The frozen language model beside it, where there is one."""

    @abstractmethod
    def language_model(self, module: Any) -> PreTrainedModel:
        """The model whose head gives logits."""

    @abstractmethod
    def part(self, module: Any, name: str, parameter: nn.Parameter) -> str:
        """What a parameter of `trained` is for."""

    def outside(self, module: Any) -> int:
        """Elements of `trained` that are read outside their submodule."""
        return 0

    @abstractmethod
    def batch(self, plan: Plan, module: Any) -> Any:
        """A micro-batch of the longest texts, with `edits` and `queries`."""

    def watched(self, module: Any, batch: Any, mode: Weightless) -> AbstractContextManager[Any]:
        """Within it a step's tensors are told apart by what they are for, and need no data."""
        return nullcontext()

    @abstractmethod
    def loss(self, module: Any, batch: Any) -> Tensor:
        """Of a micro-batch in training."""

    # ------------------------------------------------------------------ for people

    @abstractmethod
    def queries(self, module: Any) -> int:
        """Queries of each record."""

    @abstractmethod
    def changes(self, found: Estimate) -> Iterator[tuple[str, Plan]]:
        """What can be changed in such a module to save memory, as arguments and as a plan: from what leaves the result
        as it is to what trains something else."""


def shorter_chunk(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """See `Family.changes`: the logits of fewer tokens at one time."""
    if plan.module.loss.chunk > LEAST_CHUNK:
        loss = replace(plan.module.loss, chunk=LEAST_CHUNK)
        yield f"{MODEL}loss.chunk {LEAST_CHUNK}", plan.altered(loss=loss)


def half_backbone(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """See `Family.changes`: the language model in bfloat16."""
    if plan.module.backbone_config.dtype == "float32":
        backbone = replace(plan.module.backbone_config, dtype="bfloat16")
        yield f"{MODEL}backbone.dtype bfloat16", plan.altered(backbone_config=backbone)
