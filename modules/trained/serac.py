"""SERAC: edits stay in a memory; a scope classifier decides which of them a query is about, and a small counterfactual
model that reads the edit answers in the base model's place.

Paper: arXiv 2206.06520 (Mitchell et al., ICML 2022); where the released code or EasyEdit's differs, a switch says so.

N edits, Q queries, B readings, T tokens, n scored tokens.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig, load_backbone, load_tokenizer
from modules.gradients import answer_loss, predicting
from modules.interventions import checkpointed
from modules.losses import CHUNK, head_of, mean_per_row
from modules.serac.batch import SeracBatch, SeracCollator, SeracQueries
from modules.serac.editor import SeracEdited, SeracEditor
from modules.serac.encoder import TextEncoder
from modules.serac.losses import mixture_losses, scope_loss
from modules.serac.metrics import SORTS, ScopeAccuracy, scope_answers
from modules.serac.model import SeracModel, same_tokens
from modules.serac.negatives import HardNegatives
from modules.serac.scope import ScopeClassifier, ScopeConfig
from modules.trained_module import TrainedModule, WarmUp


@dataclass
class SeracLoss:
    """The terms of the loss. Each is a mean over a record's queries, then over records, so that the same records give
    the same update however they are split into micro-batches and ranks.

    Args:
        edit_weight: c_edit, of the cross-entropy of answers in scope.
        scope_weight: c_loc, of the classifier's balanced cross-entropy; with the soft mixture (`supervised: false`) of
            KL(base || mixture) on answers out of scope.
        chunk: tokens whose logits exist at one time.
    """

    edit_weight: float = 0.1
    scope_weight: float = 1.0
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if self.edit_weight < 0 or self.scope_weight < 0:
            raise ValueError(
                "model.loss.edit_weight and scope_weight must not be negative, got "
                f"{self.edit_weight}, {self.scope_weight}"
            )


@dataclass
class SeracOptimizer(WarmUp):
    """Adam at constant rates after a linear warm-up.

    Args:
        lr: of the counterfactual model.
        scope_lr: of the classifier; the same by default.
        betas: shares that stay of the running first and second moment in each step.
        eps: added to the root of the second moment.
        warmup_steps: in optimizer steps.
    """

    lr: float = 1e-5
    scope_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or (self.scope_lr is not None and self.scope_lr <= 0) or self.warmup_steps < 0:
            raise ValueError(
                "model.optimizer.lr and scope_lr must be positive, warmup_steps not negative, got "
                f"{self.lr}, {self.scope_lr}, {self.warmup_steps}"
            )


class SERAC(TrainedModule[SeracModel]):
    """The trained editor of arXiv 2206.06520.

    Args:
        backbone: the language model to edit. It stays as it is loaded, also in precision, and takes no part in training
            (but with the soft mixture).
        counterfactual: the language model that answers in scope; it is trained, in float32, and must have the
            backbone's vocabulary. By default another copy of the backbone.
        scope: the classifier, which is trained too.
        queries: what a record asks in training.
        loss: the loss terms.
        optimizer: rates.
        supervised: train the classifier on pairs in and out of scope, and the counterfactual model on the right edit,
            as published. Off: both through the soft mixture's answers alone, as EasyEdit does.
        soft: answer with the soft mixture, not by a choice of one model; always so without `supervised` (released).
        gradient_checkpointing: recompute the counterfactual model's layers in the backward pass.
        exact_match: also validate by generation.
    """

    method = "serac"

    def __init__(
        self,
        backbone: BackboneConfig,
        counterfactual: BackboneConfig | None = None,
        scope: ScopeConfig | None = None,
        queries: SeracQueries | None = None,
        loss: SeracLoss | None = None,
        optimizer: SeracOptimizer | None = None,
        supervised: bool = True,
        soft: bool = False,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
    ) -> None:
        super().__init__(backbone, exact_match)
        self.counterfactual = counterfactual or replace(backbone, dtype="float32")
        self.scope = scope or ScopeConfig()
        self.queries = queries or SeracQueries()
        self.loss = loss or SeracLoss()
        self.optimizer_config = optimizer or SeracOptimizer()
        self.supervised = supervised
        self.soft = soft or not supervised
        self._warn_of_ignored()
        self.gradient_checkpointing = gradient_checkpointing
        self.strict_loading = False  # a tied head is in a checkpoint once; on_load_checkpoint checks what is there
        self._hard: HardNegatives | None = None
        self.scope_accuracy: ScopeAccuracy | None = None

    def _warn_of_ignored(self) -> None:
        """Where the soft mixture trains, by its answers, there are no pairs."""
        rate, pairs = self.queries.hard.rate, self.queries.pairs
        unused = [f"queries.hard.rate {rate} (set it to 0)"] if rate else []
        unused += [f"queries.pairs {pairs} (set it to own)"] if pairs != "own" else []
        if unused and not self.supervised:
            rank_zero_warn(f"model.supervised false trains without pairs, so {' and '.join(unused)} changes nothing")

    # ------------------------------------------------------------------ building

    def collator(self) -> SeracCollator:
        """How the DataModule's slots become batches."""
        return SeracCollator(self.tokenizer, self.scope, self.queries, self._hard, mixture=not self.supervised)

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what can be known to be wrong before any process is started.

        Raises:
            ValueError: naming the setting.
        """
        if self.counterfactual.dtype != "float32":
            raise ValueError(
                f"model.counterfactual.dtype {self.counterfactual.dtype}: it is trained, so its weights must be "
                "float32; trainer.precision bf16-mixed computes in bfloat16"
            )
        if trainer.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"trainer.precision {trainer.precision}: similarities near 1 decide what is in scope; take 32-true or "
                "bf16-mixed"
            )
        source = self.counterfactual.source
        same_tokens(self.tokenizer, self.backbone_config.source, load_tokenizer(self.counterfactual), source)

    @property
    def serac(self) -> SeracModel:
        return self.built

    def configure_model(self) -> None:
        """Load the base model, the counterfactual model and the classifier's encoder.

        Raises:
            ValueError: where the two language models do not share a vocabulary, before either is loaded.
        """
        if self.model is not None:
            return
        other = load_tokenizer(self.counterfactual)
        same_tokens(self.tokenizer, self.backbone_config.source, other, self.counterfactual.source)
        backbone = load_backbone(self.backbone_config, self.tokenizer)
        counterfactual = load_backbone(self.counterfactual, other)
        self.model = SeracModel(backbone, counterfactual, ScopeClassifier(self.scope))

    def editor(self) -> SeracEditor:
        """This module as an editor (contract of modules/editor.py)."""
        return SeracEditor(self.serac, self.soft)

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")  # where dropout is off
        base, counterfactual = self.serac.backbone.model, self.serac.counterfactual.model
        self.hold(base, keep_dtype=True)
        self.register_external([*head_of(base), *head_of(counterfactual)])
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.queries.pairs == "pool" and getattr(datamodule, "largest_pool", 0) == 1:
            rank_zero_warn(
                "queries.pairs pool: every pool is one record (pool_sizes, records_per_batch) and has no others, so it "
                "is the same as own"
            )
        if self.supervised and self.queries.hard.rate and hasattr(datamodule, "calibration_records"):
            self._hard = self._mined(datamodule)

    def _mined(self, datamodule: Any) -> HardNegatives:
        """What hard negatives are drawn from: the same on every rank, one of which encodes it, and in a resumed run."""
        config = self.queries.hard
        records = datamodule.calibration_records(config.records)
        rank_zero_info(f"hard negatives: encoding the locality questions of {len(records):,} training records ...")
        encoder = TextEncoder(config.encoder).requires_grad_(False)

        def embed(texts: Sequence[str]) -> Tensor:
            vectors = None
            if self.trainer.is_global_zero:
                vectors = encoder.to(self.device).embed(texts).cpu()
                encoder.cpu()  # the loader's workers encode each edit there
            return self.trainer.strategy.broadcast(vectors)  # type: ignore[return-value]

        return HardNegatives(config, encoder, records, embed)

    def losses(self, batch: SeracBatch) -> dict[str, Tensor]:
        model, config, records = self.serac, self.loss, len(batch)
        queries = model.scope(batch.queries, batch.queries_mask)
        edits = model.scope(batch.edits, batch.edits_mask)
        log_similarity = model.scope.log_similarity(queries, edits)  # [Q, N]
        hidden = self._states(batch)  # [B, T, d]
        if self.supervised:
            ids, answer = batch.readings, batch.readings_answer
            edit = (batch.share * answer_loss(model.counterfactual, hidden, ids, answer, config.chunk)).sum() / records
            inside, outside = scope_loss(log_similarity, batch.positive, batch.negative)
            parts = {"edit": edit, "scope/inside": inside / records, "scope/outside": outside / records}
            scope = parts["scope/inside"] + parts["scope/outside"]
        else:
            parts = self._mixture(batch, hidden, log_similarity)
            scope = parts["locality"]
        return {"loss": config.edit_weight * parts["edit"] + config.scope_weight * scope, **parts}

    def _states(self, batch: SeracBatch) -> Tensor:
        language_model: Any = self.serac.counterfactual.model
        with checkpointed(language_model) if self.gradient_checkpointing else nullcontext():
            return language_model.base_model(
                input_ids=batch.readings, attention_mask=batch.readings_mask, use_cache=False
            ).last_hidden_state

    def _mixture(self, batch: SeracBatch, hidden: Tensor, log_similarity: Tensor) -> dict[str, Tensor]:
        """The mixture's cross-entropy in scope, and its divergence from the base model out of scope (EasyEdit)."""
        model = self.serac
        base: Any = model.backbone.model
        with torch.no_grad():
            unedited = base.base_model(
                input_ids=batch.plain, attention_mask=batch.plain_mask, use_cache=False
            ).last_hidden_state
        row, at = predicting(batch.readings_answer).nonzero(as_tuple=True)  # [n]
        plain_row, plain_at = predicting(batch.plain_answer).nonzero(as_tuple=True)  # the same tokens in the same order
        similarity = log_similarity[batch.own[:, 0], batch.own[:, 1]].exp()[row]
        ce, kl = mixture_losses(
            similarity,
            hidden[row, at],
            head_of(model.counterfactual.model),
            unedited[plain_row, plain_at],
            head_of(base),
            batch.readings[row, at + 1],
            self.loss.chunk,
        )
        ce, kl = (batch.share * mean_per_row(values, row, len(batch.share)) for values in (ce, kl))
        return {
            "edit": (ce * batch.in_scope).sum() / len(batch),
            "locality": (kl * ~batch.in_scope).sum() / len(batch),
        }

    def configure_optimizers(self) -> Any:
        config, model = self.optimizer_config, self.serac
        groups = [
            {"params": list(model.language_model.parameters()), "lr": config.lr},
            {"params": list(model.scope.parameters()), "lr": config.scope_lr or config.lr},
        ]
        # without weight decay AdamW is Adam
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, weight_decay=0.0)
        return self.scheduled(optimizer, config.share)

    # ------------------------------------------------------------------ validation

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.scope_accuracy = ScopeAccuracy().to(self.device)

    def validation_losses(self, records: Sequence[EditRecord]) -> dict[str, Tensor]:
        """The loss of each record by itself."""
        slots = [Slot(r, i, i) for i, r in enumerate(records)]
        return self.losses(self._validation_collator(slots).to(self.device))

    def look(self, edited: SeracEdited, records: Sequence[EditRecord]) -> None:
        """The classifier's accuracy over the memory of a pool."""
        assert self.scope_accuracy is not None
        self.scope_accuracy.update(scope_answers(edited, records))

    @cached_property
    def _validation_collator(self) -> SeracCollator:
        """Without hard negatives, so that the loss of runs with and without them can be compared."""
        return SeracCollator(self.tokenizer, self.scope, self.queries, mixture=not self.supervised)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        assert self.scope_accuracy is not None
        for name, value in self.scope_accuracy.compute().items():
            self.log(f"val/scope/{name}", value, sync_dist=True)

    def may_log(self) -> set[str]:
        return super().may_log() | {f"val/scope/{name}" for name in (*SORTS, "accuracy")}

    # ------------------------------------------------------------------ checkpoints

    def trained_names(self) -> set[str]:
        """What a checkpoint holds: the counterfactual model and the classifier, a tied head once."""
        return {name for name, _ in self.named_parameters() if name.startswith("model.")}
