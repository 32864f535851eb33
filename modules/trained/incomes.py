"""InComeS: compress an edit into a gist, let tokens select among gists, learn both from a teacher that reads the edit.

Paper: arXiv 2505.22156; where the released code differs, a switch says so.
B queries, T tokens, n scored tokens, N edits.
"""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from datamodules.tokens import adds_bos
from modules.backbone import Backbone, BackboneConfig, WithoutAdapters, adapters_off, cast, load_backbone, only_adapters
from modules.gist.attention import refuse_flash
from modules.gist.batch import GistBatch, GistCollator, QueryConfig
from modules.gist.calibration import calibrate
from modules.gist.editor import GistEditor
from modules.gist.model import GistConfig, GistModel
from modules.gradients import reached
from modules.interventions import checkpointed
from modules.losses import (
    Head,
    edit_sensitivity,
    head_of,
    mean_per_row,
    token_ce_and_kl,
    token_cross_entropy,
    token_log_probs,
    weighted_mean,
)
from modules.trained.incomes_config import LoraOptions, LossConfig, OptimizerConfig
from modules.trained_module import TrainedModule

_BOS = "gist_bos"  # in a checkpoint: whether queries began with a BOS


class InComeS(TrainedModule[GistModel]):
    """The trained editor of arXiv 2505.22156.

    Args:
        backbone: the language model to edit.
        gist: compression and selection.
        queries: what a record asks in training.
        loss: the loss terms.
        optimizer: rates and schedule.
        train: what of the language model is trained: `full`, all of it (published); `upper`, the layers that take part
            and those above them; `lora`, adapters on them, the teacher being the same model with its adapters off.
        reader: which model answers queries. `student`: the one that compresses (published). `original`: the unedited
            model, reading the gists that the student wrote; ours. A query that reads nothing then has exactly the
            original's answer, so what is trained cannot cost locality by drifting.
        lora: the adapters' size.
        teacher_dtype: of the frozen teacher; where None the backbone's, under ZeRO that of the training. Ignored with
            `train: lora`.
        visible_warmup_steps: over these steps the share of the pool that a query sees grows from its own gist to all.
        calibration_records: how many training records set where selection starts; 0: none. `gist.zero_key: mean_query`
            needs some.
        calibration_steps: of fitting the matcher (selection: hidden).
        gradient_checkpointing: recompute activations in the backward pass, those of an original reader too.
        exact_match: also validate by generation.
        seed: of the model's own draws.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        gist: GistConfig | None = None,
        queries: QueryConfig | None = None,
        loss: LossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        train: Literal["full", "upper", "lora"] = "full",
        reader: Literal["student", "original"] = "student",
        lora: LoraOptions | None = None,
        teacher_dtype: Literal["float32", "bfloat16", "float16"] | None = None,
        visible_warmup_steps: int = 0,
        calibration_records: int = 0,
        calibration_steps: int = 200,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, exact_match)
        refuse_flash(backbone.attention)
        self.gist_config = gist or GistConfig()
        self.queries = queries or QueryConfig()
        self.loss = loss or LossConfig()
        self.optimizer_config = optimizer or OptimizerConfig()
        self.train_part = train
        self.reader: Literal["student", "original"] = reader
        self.lora = lora or LoraOptions()
        self.teacher_dtype = teacher_dtype
        self.visible_warmup_steps = visible_warmup_steps
        self.calibration_records = calibration_records
        self.calibration_steps = calibration_steps
        self.gradient_checkpointing = gradient_checkpointing
        self.seed = seed
        self.strict_loading = False  # frozen parameters are never in a checkpoint; on_load_checkpoint checks the rest
        self._outside: dict[str, Any] = {}  # what must be neither trained, sharded nor saved: the teacher

    # ------------------------------------------------------------------ building

    def collator(self) -> GistCollator:
        """How the DataModule's slots become batches."""
        return GistCollator(self.tokenizer, self.queries, self.gist_config.bos)

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what can be known to be wrong before any process is started.

        Raises:
            ValueError: naming the setting.
        """
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {trainer.precision} rounds the angles of the student's positions, and not those of "
                "its teacher; take bf16-mixed"
            )
        gist = self.gist_config
        if gist.selection != "hidden" and gist.zero_key == "mean_query" and not self.calibration_records:
            raise ValueError(
                "model.gist.zero_key mean_query is the mean over the texts of training records, and "
                "model.calibration_records is 0: set it to a few hundred, or zero_key to normal"
            )
        dtype = self.backbone_config.dtype
        keeps_float32 = hasattr(trainer.strategy, "hold")  # ZeRO: the optimizer's own copy of what is trained
        if self.train_part != "lora" and dtype != "float32" and not keeps_float32:
            raise ValueError(
                f"model.backbone.dtype {dtype} with model.train {self.train_part}: most steps are too small to change "
                "a weight of 16 bits. Take float32 (trainer.precision bf16-mixed computes in bfloat16), train: lora, "
                "whose adapters are float32, or ZeRO (--config zero2.yaml), which keeps float32 copies of the weights"
            )

    @property
    def gists(self) -> GistModel:
        return self.built

    def configure_model(self) -> None:
        """Load the backbone, put the teacher aside, choose what is trained, calibrate selection."""
        if self.model is not None:
            return
        backbone = load_backbone(self.backbone_config, self.tokenizer)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.train_part == "lora":  # before the gists' hooks, which must see the adapted keys
                inject_adapter_in_model(self.adapter_config(backbone), backbone.model)
            elif self.teaches or self.reader == "original":
                teacher = copy.deepcopy(backbone.model)
                if self.teacher_dtype:
                    cast(teacher, getattr(torch, self.teacher_dtype))
                self._outside["teacher"] = teacher
            self.model = GistModel(backbone, self.gist_config, self._original_reader(backbone))
            self._unfreeze(self.model)
        datamodule = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        if datamodule is not None and self.calibration_records and hasattr(datamodule, "calibration_records"):
            rank_zero_info(f"calibrating selection on {self.calibration_records} training records ...")
            records = datamodule.calibration_records(self.calibration_records)
            for model in (self.model, self.model.reader.model):  # ZeRO-3 has modules built on the CPU
                model.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
            calibrate(self.model, records, self.seed, self.calibration_steps)
        self.model.train()
        if self.gradient_checkpointing:
            if self.train_part == "lora" and self.reader == "original":
                raise ValueError(
                    "model.gradient_checkpointing is not supported with train: lora and reader: original "
                    "(a layer that is run again must find its adapters as they were); switch it off"
                )
            backbone.model.gradient_checkpointing_enable({"use_reentrant": False})

    def _original_reader(self, backbone: Backbone) -> Backbone | None:
        if self.reader == "student":
            return None
        if self.train_part == "lora":
            return WithoutAdapters(backbone.model, backbone.tokenizer, backbone.config)
        return Backbone(self._outside["teacher"], backbone.tokenizer, backbone.config)

    def adapter_config(self, backbone: Backbone) -> LoraConfig:
        """peft's description of the adapters (`train: lora`)."""
        return LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            target_modules=self.lora.targets,
            layers_to_transform=list(self.gist_config.active(len(backbone.layers))),
            layers_pattern=backbone.parts.layers.split(".")[-1],
        )

    def _unfreeze(self, model: GistModel) -> None:
        language_model, layers = model.language_model, model.backbone.layers
        if self.train_part == "full":
            language_model.requires_grad_(True)
        elif self.train_part == "upper":
            for i in model.active:
                layers[i].requires_grad_(True)
            if self.reader == "student":  # compression never reaches the last norm
                language_model.get_submodule(model.backbone.parts.norm).requires_grad_(True)
        else:
            only_adapters(language_model)
        if self.reader == "original":  # compression ends at the keys and values of the last layer
            ids = torch.zeros(1, 2, dtype=torch.long, device=model.backbone.device)
            with torch.enable_grad():
                made = model.compress(ids, torch.ones_like(ids)).tensors()
            by_keys = self.gist_config.selection != "hidden"  # which is by addresses alone
            trained = reached(t for name, t in made.items() if by_keys or not name.endswith(".keys"))
            for p in language_model.parameters():
                p.requires_grad_(id(p) in trained)

    @property
    def teacher(self) -> nn.Module:
        return self._outside.get("teacher") or self.gists.language_model

    @contextmanager
    def teaching(self) -> Iterator[nn.Module]:
        """The original model: the frozen copy, or the student with its adapters off."""
        student_trains = self.gists.language_model.training
        try:
            with adapters_off(self.gists.language_model):
                self.teacher.eval()
                yield self.teacher
        finally:
            self.gists.language_model.train(student_trains)

    def editor(self) -> GistEditor:
        """This module as an editor (contract of modules/editor.py)."""
        return GistEditor(self.gists)

    @contextmanager
    def original(self) -> Iterator[Backbone]:
        """The unedited model as a backbone: what locality is measured against."""
        with self.teaching() as model:
            yield Backbone(model, self.tokenizer, self.backbone_config)  # type: ignore[arg-type]

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        if "teacher" in self._outside:
            self.hold(self._outside["teacher"], keep_dtype=self.teacher_dtype is not None)
        heads = [head_of(m) for m in (self.gists.language_model, self.gists.reader.model, self.teacher)]
        own = [p for n, p in self.gists.named_parameters() if not n.startswith("language_model.")]
        self.register_external([*own, *(p for head in heads for p in head)])

    def on_train_epoch_start(self) -> None:
        self.gists.language_model.train()

    def step_losses(self, batch: GistBatch, batch_idx: int) -> dict[str, Tensor]:
        return self.losses(batch, self.visible(batch))

    def visible(self, batch: GistBatch) -> Tensor:
        """Which edits each query sees [B, N]: its pool; in the warm-up its own edit and a growing share of that."""
        step, steps = self.global_step, self.visible_warmup_steps
        if step >= steps:
            return batch.visible
        draw = torch.Generator().manual_seed(hash((self.seed, step)) % 2**63)
        others = torch.rand(batch.visible.shape, generator=draw).to(batch.visible.device) < step / steps
        own = torch.arange(batch.visible.shape[1], device=batch.visible.device)[None] == batch.golden[:, None]
        return batch.visible & (others | own)

    def losses(self, batch: GistBatch, visible: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """See `TrainedModule.losses`. Positions: the token at i is predicted at i - 1."""
        config, model = self.loss, self.gists
        everywhere = batch.queries_mask.bool()
        wanted = everywhere if "all" in (config.ce_on, config.kl_on) else batch.answer
        wanted = wanted.clone()
        bos = self.gist_config.bos and adds_bos(self.tokenizer)
        wanted[:, : 1 + bos] = False  # before a text's first token nothing is known of it
        row, at = wanted.nonzero(as_tuple=True)  # [n]
        answer = batch.answer[row, at]
        labels = batch.queries[row, at]
        in_scope = (batch.golden >= 0)[row]

        weights = (in_scope & answer if config.ce_on == "answer" else in_scope).float()
        told: dict[str, Tensor] = {}
        taught = self._teach(batch, row, at, in_scope) if config.weighted or config.kl_weight else None
        if taught and config.weighted:
            alone, with_edit = (
                token_log_probs(h, taught.head, labels[in_scope], config.chunk)
                for h in (taught.alone[in_scope], taught.with_edit)
            )
            gain = edit_sensitivity(with_edit, alone, config.weight_scale)
            weights = weights * torch.zeros_like(weights).masked_scatter(in_scope, gain.to(weights))
            told["teacher_ce"] = _mean_in_scope(-with_edit, row[in_scope], answer[in_scope], batch)

        trace: dict[int, Tensor] | None = {} if config.golden_weight else None
        pool = model.compress(batch.edits, batch.edits_mask)
        with self._rerunning_reader():
            out, _ = model(batch.queries, batch.queries_mask, pool, visible, trace=trace)
        h, head = out.last_hidden_state[row, at - 1], head_of(model.reader.model)  # [n, d]
        queries = len(batch)
        if taught:
            # in scope the teacher has read the edit
            teacher_h = taught.alone.masked_scatter(in_scope[:, None], taught.with_edit).to(taught.head.weight.dtype)
            ce, kl = token_ce_and_kl(h, head, labels, teacher_h, taught.head, config.chunk)
            kl_at = answer if config.kl_on == "answer" else torch.ones_like(answer)
            told["kl"] = mean_per_row(kl[kl_at], row[kl_at], queries).mean()
        else:
            ce = token_cross_entropy(h, head, labels, config.chunk)
        parts = {"weighted_ce": weighted_mean(ce, weights, row, queries).mean(), **told}
        loss = config.ce_weight * parts["weighted_ce"] + config.kl_weight * parts.get("kl", 0)
        if trace:
            parts |= self._golden(batch, trace, row[answer], at[answer] - 1)
            loss = loss + config.golden_weight * (parts["golden"] + parts["zero"])
        return {"loss": loss, **parts}

    def _rerunning_reader(self) -> AbstractContextManager[None]:
        """Gradients reach the gists through all that an original reads: its layers are run again as the student's."""
        apart = self.gists.reader is not self.gists.backbone
        again = apart and self.gradient_checkpointing and torch.is_grad_enabled()
        return checkpointed(self.gists.reader.model) if again else nullcontext()

    @torch.no_grad()
    def _teach(self, batch: GistBatch, row: Tensor, at: Tensor, in_scope: Tensor) -> "_Taught":
        """What the teacher has where the scored tokens are predicted."""
        with self.teaching() as teacher:
            mask = block_mask(batch.teacher_blocks, next(teacher.parameters()).dtype)
            states = teacher.base_model(  # type: ignore[operator]
                input_ids=batch.teacher, attention_mask=mask, position_ids=batch.teacher_positions, use_cache=False
            ).last_hidden_state
            alone = states[row, batch.alone[row] + at - 1]
            with_edit = states[row, batch.with_edit[row] + at - 1][in_scope]
            return _Taught(alone, with_edit, head_of(teacher))

    def _golden(self, batch: GistBatch, trace: dict[int, Tensor], row: Tensor, at: Tensor) -> dict[str, Tensor]:
        """-log p(right gist) in scope and -log p(zero-gist) out of it: means over queries and layers."""
        golden = batch.golden[row]
        logp = list({id(t): t for t in trace.values()}.values())  # one tensor where all layers share a choice
        picked = torch.stack([t[row, at].gather(1, (golden % t.shape[2])[:, None])[:, 0] for t in logp]).mean(0)
        missed = mean_per_row(-picked.clamp(min=-20.0), row, len(batch))  # [B]; -1 % (N + 1) is the zero-gist
        inside = batch.golden >= 0
        return {"golden": (missed * inside).mean(), "zero": (missed * ~inside).mean()}

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        trained = {n: p for n, p in self.gists.named_parameters() if p.requires_grad}
        selection = [p for n, p in trained.items() if n.startswith(("selectors.", "matcher."))]
        language = [p for n, p in trained.items() if not n.startswith(("selectors.", "matcher."))]
        selection_lr = config.lr if config.selection_lr is None else config.selection_lr
        groups = [{"params": language, "lr": config.lr}, {"params": selection, "lr": selection_lr}]
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
        )
        steps = config.decay_steps or self.trainer.estimated_stepping_batches
        return self.scheduled(optimizer, lambda step: config.share(step, int(steps)))

    # ------------------------------------------------------------------ checkpoints

    def trained_names(self) -> set[str]:
        """What a checkpoint holds: trained parameters, and the statistics that selection starts from."""
        names = {n for n, p in self.named_parameters() if p.requires_grad}
        return names | {n for n, _ in self.named_buffers() if n.startswith("model.matcher.")}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint[_BOS] = self.gist_config.bos

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError for a checkpoint whose queries had a BOS where this module's have none, or the reverse."""
        then, now = checkpoint.get(_BOS, False), self.gist_config.bos  # there was none before the setting was there
        if then != now and adds_bos(self.tokenizer):
            raise ValueError(
                f"the checkpoint was trained with model.init_args.gist.bos {str(then).lower()}, the config says "
                f"{str(now).lower()}: set it as it was (to export a run: in the config.yaml of its folder)"
            )
        super().on_load_checkpoint(checkpoint)


class _Taught(NamedTuple):
    """The teacher's states without an edit [n, d], and with it [in scope, d]."""

    alone: Tensor
    with_edit: Tensor
    head: Head


def _mean_in_scope(values: Tensor, row: Tensor, answer: Tensor, batch: GistBatch) -> Tensor:
    """Mean over each query's answer, then over the queries in scope; 0 without any. All [tokens in scope]."""
    per_query = mean_per_row(values[answer], row[answer], len(batch))
    return per_query.sum() / (batch.golden >= 0).sum().clamp(min=1)


def block_mask(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Causal attention within blocks: block numbers [B, T] -> additive mask [B, 1, T, T]; every token sees itself."""
    t = blocks.shape[1]
    causal = torch.ones(t, t, dtype=torch.bool, device=blocks.device).tril()
    itself = torch.eye(t, dtype=torch.bool, device=blocks.device)
    seen = ((blocks[:, :, None] == blocks[:, None, :]) & causal) | itself
    return torch.zeros(seen.shape, dtype=dtype, device=blocks.device).masked_fill(~seen, torch.finfo(dtype).min)[
        :, None
    ]
