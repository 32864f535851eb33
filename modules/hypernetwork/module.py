"""Training of an editor that turns gradients into edits: many independent edits in one forward and backward pass.

For a micro-batch: the gradient factors of every edit (one pass forward and backward through the frozen model), the
hypernetwork's deltas, then all queries through the model, each row under the deltas of its own pool. The loss reaches
the hypernetwork through the edited forward pass; the factors themselves are constants, as published.

N edits, B queries, T tokens, n scored tokens.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import Backbone, BackboneConfig, Parts, load_backbone
from modules.from_layer import Entering, entering, from_layer
from modules.gradients import answer_loss, gradient_factors
from modules.hypernetwork.batch import EditBatch, EditCollator, EditQueries
from modules.hypernetwork.editor import DeltaEditor, DeltaModel
from modules.hypernetwork.network import Hypernetwork
from modules.hypernetwork.pooled import Pooled
from modules.interventions import Deltas, Term, checkpointed, low_rank, shape
from modules.losses import head_of, mean_per_row, token_kl
from modules.trained_module import TrainedModule, WarmUp

CALIBRATION_CHUNK = 16  # records


@dataclass
class EditedLayers:
    """Which linear layers are edited.

    Args:
        layers: numbers of decoder layers; negative ones count from the last.
        modules: names of linear layers within a layer, such as mlp.down_proj; by default the method's own choice.
    """

    layers: list[int] = field(default_factory=lambda: [-3, -2, -1])
    modules: list[str] | None = None

    def names(self, backbone: Backbone, default: Sequence[str]) -> list[str]:
        """Their names in the model.

        Args:
            default: `modules` where none are given.

        Raises:
            ValueError: for a layer that the model does not have.
        """
        count = len(backbone.layers)
        wrong = [i for i in self.layers if not -count <= i < count]
        if wrong or not self.layers:
            raise ValueError(f"layers.layers must be among 0 to {count - 1} (or -{count} to -1), got {self.layers}")
        within = self.modules or default
        numbers = dict.fromkeys(i % count for i in self.layers)
        return [f"{backbone.parts.layers}.{i}.{name}" for i in numbers for name in within]


@dataclass
class EditLoss:
    """The terms of the loss. Each is a mean over a query's tokens, then over records, so that the same records give the
    same update however they are split into micro-batches and ranks.

    Args:
        edit_weight: of the cross-entropy of queries that the edit is to change.
        locality_weight: of the divergence of the edited model from the unedited one, at queries it must leave alone.
        locality_on: `all` text tokens of these queries, or `answer` tokens.
        locality_direction: `forward`: KL(unedited || edited) (MEND); `reverse`: KL(edited || unedited) (IBKE).
        chunk: tokens whose logits exist at one time.
    """

    edit_weight: float = 0.1
    locality_weight: float = 1.0
    locality_on: Literal["all", "answer"] = "all"
    locality_direction: Literal["forward", "reverse"] = "forward"
    chunk: int = 1024

    def __post_init__(self) -> None:
        if self.edit_weight < 0 or self.locality_weight < 0:
            raise ValueError(
                f"model.loss.edit_weight and locality_weight must not be negative, got {self.edit_weight}, "
                f"{self.locality_weight}"
            )


@dataclass
class HyperOptimizer(WarmUp):
    """Adam at constant rates after a linear warm-up.

    Args:
        lr: of the hypernetwork.
        rates_lr: of the step sizes of edits, which are learned too.
        betas: shares that stay of the running first and second moment in each step.
        eps: added to the root of the second moment.
        warmup_steps: in optimizer steps.
    """

    lr: float = 1e-6
    rates_lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.rates_lr < 0 or self.warmup_steps < 0:
            raise ValueError(
                "model.optimizer.lr must be positive, rates_lr and warmup_steps not negative, got "
                f"{self.lr}, {self.rates_lr}, {self.warmup_steps}"
            )


class GradientEditor(TrainedModule[DeltaModel]):
    """What trained editors on gradient factors share; a subclass brings the hypernetwork.

    Args:
        backbone: the language model to edit. It stays as it is loaded, also in precision: bfloat16 halves its memory
            while the hypernetwork trains in float32.
        layers: what of it is edited.
        queries: what a record asks in training.
        loss: the loss terms.
        optimizer: rates.
        calibration_records: training records that the statistics of factors begin with.
        gradient_checkpointing: recompute the layers above the lowest edited one in the backward pass.
        exact_match: also validate by generation.
        seed: of the hypernetwork's start.
    """

    method: str  # how results call it

    def __init__(
        self,
        backbone: BackboneConfig,
        layers: EditedLayers | None = None,
        queries: EditQueries | None = None,
        loss: EditLoss | None = None,
        optimizer: HyperOptimizer | None = None,
        calibration_records: int = 64,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, exact_match)
        if calibration_records < 1:
            raise ValueError(f"model.calibration_records must be at least 1, got {calibration_records}")
        self.layers = layers or EditedLayers()
        self.queries = queries or EditQueries()
        self.loss = loss or EditLoss()
        self.optimizer_config = optimizer or HyperOptimizer()
        self.calibration_records = calibration_records
        self.gradient_checkpointing = gradient_checkpointing
        self.seed = seed

    @abstractmethod
    def network(self, shapes: Mapping[str, tuple[int, int]]) -> Hypernetwork:
        """A new hypernetwork for linear layers of these (d_in, d_out)."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `network` depends on besides the shapes, as an export keeps it."""

    @classmethod
    @abstractmethod
    def of(cls, backbone: BackboneConfig, layers: EditedLayers, settings: dict[str, Any]) -> "GradientEditor":
        """An untrained module with these settings.

        Raises:
            KeyError, TypeError, ValueError: for settings that `settings` did not give.
        """

    def edited_modules(self, parts: Parts) -> Sequence[str]:
        """What is edited of a layer where `layers.modules` is not given."""
        return parts.mlp

    # ------------------------------------------------------------------ building

    def collator(self) -> EditCollator:
        """How the DataModule's slots become batches."""
        return EditCollator(self.tokenizer, self.queries)

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what can be known to be wrong before any process is started.

        Raises:
            ValueError: naming the setting.
        """
        precision = trainer.precision
        casts = hasattr(trainer.strategy, "hold") and precision != "32-true"  # DeepSpeed casts all that it trains
        if casts or precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision {precision}: the hypernetwork must stay in float32; set 32-true, and "
                "model.backbone.dtype to bfloat16 to halve the language model"
            )

    @property
    def deltas(self) -> DeltaModel:
        return self.built

    def configure_model(self) -> None:
        """Load the backbone, and make the hypernetwork for its layers."""
        if self.model is not None:
            return
        backbone = load_backbone(self.backbone_config, self.tokenizer)
        default = self.edited_modules(backbone.parts)
        shapes = {name: shape(backbone.model, name) for name in self.layers.names(backbone, default)}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.model = DeltaModel(backbone, self.network(shapes))

    def editor(self) -> DeltaEditor:
        """This module as an editor (contract of modules/editor.py)."""
        return DeltaEditor(self.deltas, self.method)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        model = self.deltas.backbone.model
        self.hold(model, keep_dtype=True)
        self.register_external(head_of(model))
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        self._warn_of_no_others(datamodule)
        if self.trainer.ckpt_path is None and hasattr(datamodule, "calibration_records"):
            rank_zero_info(f"statistics of the gradients of {self.calibration_records} training records ...")
            records = datamodule.calibration_records(self.calibration_records)
            gathered = getattr(self.trainer.strategy, "gathered", nullcontext)
            with gathered(), self.trainer.precision_plugin.forward_context():
                self.calibrate(records)

    def _warn_of_no_others(self, datamodule: Any) -> None:
        largest = getattr(datamodule, "largest_pool", 0)
        if self.queries.locality_from == "others" and self.queries.locality and largest >= datamodule.records_per_batch:
            rank_zero_warn(
                f"queries.locality_from others: a micro-batch of one pool (pool_sizes up to {largest}, "
                f"records_per_batch {datamodule.records_per_batch}) has no others, and its records are asked their own "
                "locality queries; raise records_per_batch"
            )

    def calibrate(self, records: Sequence[EditRecord]) -> None:
        """Let the statistics of factors begin with these records, the same on every rank."""
        model = self.deltas
        collate = self.collator()
        for at in range(0, len(records), CALIBRATION_CHUNK):
            slots = [Slot(r, i, i) for i, r in enumerate(records[at : at + CALIBRATION_CHUNK])]
            batch = collate(slots).to(model.backbone.device)
            factors, _ = self._factors(batch)
            model.network.observe(factors)
        model.network.commit(ranks=False)

    def step_losses(self, batch: EditBatch, batch_idx: int) -> dict[str, Tensor]:
        parts = self.losses(batch, training=True)
        # an epoch, and a resumed run, begins with the first micro-batch of an optimizer step
        if (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0:
            self.deltas.network.commit()
        return parts

    def losses(self, batch: EditBatch, training: bool = False) -> dict[str, Tensor]:
        """The loss and its parts for one micro-batch.

        Args:
            training: let this batch's factors count in the running statistics, from the end of the step on, and draw
                what is random in training.
        """
        again = training and self.gradient_checkpointing
        with checkpointed(self.deltas.backbone.model) if again else nullcontext():
            return self._losses(batch, training)

    def _losses(self, batch: EditBatch, training: bool) -> dict[str, Tensor]:
        config, model = self.loss, self.deltas
        backbone, network = model.backbone, model.network
        factors, _ = self._factors(batch)
        if training:
            network.observe(factors)
        deltas, penalties = network(factors, batch.edit_seed if training else None)
        with low_rank(backbone.model, self._terms(batch, deltas)), entering(backbone.layers[self._lowest]) as below:
            hidden = self._states(batch.queries, batch.queries_mask)  # [B, T, d]
        inside = batch.in_scope
        nll = answer_loss(backbone, hidden[inside], batch.queries[inside], batch.queries_answer[inside], config.chunk)
        records = len(batch)
        parts = {"edit": nll.sum() / (records * self.queries.generality)}
        loss = config.edit_weight * parts["edit"]
        if self.queries.locality:
            kl = self._locality(batch, hidden[~inside], below[0])
            parts["locality"] = kl.sum() / (records * self.queries.locality)
            loss = loss + config.locality_weight * parts["locality"]
        share = self._share(batch)
        parts |= {name: (of_edits * share).sum() for name, of_edits in penalties.items()}
        return {"loss": loss + sum(parts[name] for name in penalties), **parts}

    def _terms(self, batch: EditBatch, deltas: Mapping[str, Deltas]) -> dict[str, Term]:
        """What is added to each layer's output at the rows of all queries."""
        terms = {name: d.term(batch.pools, batch.edit_pool) for name, d in deltas.items()}
        if batch.pools == len(batch):  # of one record each: its factors are few
            return {name: term[batch.query_pool] for name, term in terms.items()}
        return {name: Pooled(term, batch.query_pool) for name, term in terms.items()}

    def _share(self, batch: EditBatch) -> Tensor:
        """How much each edit counts [N]: a record's share, divided among the edits of its pool."""
        edits = batch.edit_pool.bincount(minlength=batch.pools)
        records = batch.query_pool[batch.in_scope].bincount(minlength=batch.pools) / self.queries.generality
        return (records / edits)[batch.edit_pool] / len(batch)

    def _factors(self, batch: EditBatch) -> tuple[Any, Tensor]:
        model = self.deltas
        return gradient_factors(
            model.backbone, model.names, batch.edits, batch.edits_mask, batch.edits_answer, self.loss.chunk
        )

    def _states(self, ids: Tensor, mask: Tensor) -> Tensor:
        decoder = self.deltas.backbone.model.base_model
        return decoder(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    @property
    def _lowest(self) -> int:
        """The lowest edited layer: what comes into it no edit changes."""
        return min(i % len(self.deltas.backbone.layers) for i in self.layers.layers)

    def _locality(self, batch: EditBatch, hidden: Tensor, below: Entering) -> Tensor:
        """Mean divergence of the edited from the unedited model over each out-of-scope query's tokens [queries].

        Args:
            below: what came into the lowest edited layer, of all queries.
        """
        config, outside, share = self.loss, ~batch.in_scope, 1.0
        if not outside.any():  # a pass all the same: with weights in shards every rank must make as many
            outside, share = torch.arange(len(outside), device=outside.device) < 1, 0.0
            hidden = hidden.new_zeros(1, *hidden.shape[1:])
        ids, mask, answer = batch.queries[outside], batch.queries_mask[outside], batch.queries_answer[outside]
        layers = self.deltas.backbone.layers
        with torch.no_grad(), from_layer(layers, self._lowest, lambda: below.hidden[outside], below.tupled):
            unedited = self._states(ids, mask)
        wanted = answer if config.locality_on == "answer" else mask.bool()
        row, at = wanted[:, 1:].nonzero(as_tuple=True)  # the token at i + 1 is predicted at i
        head = head_of(self.deltas.backbone.model)
        kl = token_kl(hidden[row, at], head, unedited[row, at], head, config.chunk, direction=config.locality_direction)
        return share * mean_per_row(kl, row, len(ids))

    def configure_optimizers(self) -> Any:
        config, network = self.optimizer_config, self.deltas.network
        rates = network.rates()
        others = [p for p in network.parameters() if not any(p is r for r in rates)]
        groups = [{"params": others, "lr": config.lr}, {"params": rates, "lr": config.rates_lr}]
        # without weight decay AdamW is Adam
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=config.betas, eps=config.eps, weight_decay=0.0
        )
        return self.scheduled(optimizer, config.share)

    # ------------------------------------------------------------------ validation

    def validation_losses(self, records: Sequence[EditRecord]) -> dict[str, Tensor]:
        """The loss of each edit by itself."""
        slots = [Slot(r, i, i) for i, r in enumerate(records)]
        return self.losses(self._validation_collator(slots).to(self.device))

    @cached_property
    def _validation_collator(self) -> EditCollator:
        """A validation batch may be one record, which has no others: as published, locality is of its own queries."""
        return EditCollator(self.tokenizer, replace(self.queries, locality_from="record"))

    # ------------------------------------------------------------------ checkpoints

    def trained_names(self) -> set[str]:
        """What a checkpoint holds: the hypernetwork, and the statistics of factors."""
        every = [*self.named_parameters(), *self.named_buffers()]
        return {name for name, _ in every if name.startswith("model.")}
