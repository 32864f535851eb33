"""DistillMIKE: what a model says with demonstrations before its prompts, put into its adapters.

Paper: "DistillMIKE: Editing Distillation of Massive In-Context Knowledge Editing in Large Language Models" (Qiao, Liu
and Na); where the released code differs, a switch says so. Unlike the other trained editors it is trained on the edits
that it is to make: the training records.

B queries, T tokens, n scored tokens, d hidden width.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _InfiniteBarrier
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from tqdm import tqdm

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone, BackboneConfig, adapters_off, load_backbone
from modules.checkpoint_names import misfit
from modules.distill.editor import DistilledEditor, unknown_among
from modules.distill.loss import kept_kl
from modules.distill.queries import DistillBatch, DistillCollator, DistillQueries, Question, questions_of
from modules.distill.start import as_sum, digest, file_in, make, moved, read
from modules.distill.store import BLOCK, Answered, Teaching, file_of, teach
from modules.distill.student import AdapterOptions, Student
from modules.distill.teacher import asked_of
from modules.editor import Editor
from modules.fingerprint import weights_hash
from modules.interventions import checkpointed
from modules.losses import CHUNK, head_of, mean_per_row
from modules.summed import Summed
from modules.trained_module import TrainedModule, WarmUp

KEPT = "distilled"  # in a checkpoint: the edits, and the start


@dataclass
class DistillLoss:
    """The two teachers' terms (paper, eq. 5). Each question counts by the mean over its target's tokens, each record by
    the mean over its questions, so that the same records give the same update however they are split.

    Args:
        ike_weight: of questions in scope. 2 is the released factor of 1e5 on a mean that also runs over GPT-J's
            vocabulary of 50,400.
        base_weight: of the others; 0 is the paper's ablation without the unedited teacher (table 3).
        chunk: tokens whose logits exist at one time.
    """

    ike_weight: float = 2.0
    base_weight: float = 2.0
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        if min(self.ike_weight, self.base_weight) < 0 or not self.ike_weight + self.base_weight or self.chunk < 1:
            raise ValueError(
                "model.loss.ike_weight and base_weight must not be negative, nor both zero, and chunk at least 1; got "
                f"{self.ike_weight}, {self.base_weight}, {self.chunk}"
            )


@dataclass
class DistillOptimizer(WarmUp):
    """AdamW at a constant rate after a linear warm-up (released: torch's defaults, no warm-up).

    Args:
        lr: of the adapters.
        betas: shares that stay of the running first and second moment in each step.
        eps: added to the root of the second moment.
        weight_decay: what a parameter loses in each step, as a share of itself, times the rate.
        warmup_steps: in optimizer steps.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError(
                "model.optimizer.lr must be positive, weight_decay and warmup_steps not negative, got "
                f"{self.lr}, {self.weight_decay}, {self.warmup_steps}"
            )


class DistillMIKE(TrainedModule[Student]):
    """Distils one set of edits, the training records', into adapters.

    Before the first step it makes the edits that the student starts from and asks the teacher all questions; both are
    of the model as it is loaded, so its precision is `backbone.dtype`, whatever the training's.

    Args:
        backbone: the language model to edit.
        teacher: an editor that puts text before prompts, and nothing before those out of its edits' scope: MIKE
            (published), IKE, RAG.
        start: what the student starts from: an editor of weights by class_path and init_args (published: MEMIT), which
            makes the edits then; a folder that `trainers.edit --save` wrote, which must stay: checkpoints do not hold
            it; or nothing.
        queries: what a record asks.
        teaching: how the teacher's distributions are made and kept.
        loss: the loss terms.
        adapters: what is trained.
        optimizer: rates.
        gradient_checkpointing: recompute activations in the backward pass.
        exact_match: also validate by generation.
        seed: of the adapters' start.
    """

    validates_what_fits = True  # to the DataModule: it knows no edits but those it is trained on

    def __init__(
        self,
        backbone: BackboneConfig,
        teacher: Editor,
        start: Editor | str | None = None,
        queries: DistillQueries | None = None,
        teaching: Teaching | None = None,
        loss: DistillLoss | None = None,
        adapters: AdapterOptions | None = None,
        optimizer: DistillOptimizer | None = None,
        gradient_checkpointing: bool = False,
        exact_match: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, exact_match)
        self.teacher = teacher
        self.start: Editor | str | None = start
        self.queries = queries or DistillQueries()
        self.teaching = teaching or Teaching()
        self.loss = loss or DistillLoss()
        self.adapters = adapters or AdapterOptions()
        self.optimizer_config = optimizer or DistillOptimizer()
        self.gradient_checkpointing = gradient_checkpointing
        self.seed = seed
        self.strict_loading = False  # frozen parameters are never in a checkpoint; on_load_checkpoint checks the rest
        self.requests: tuple[EditRequest, ...] = ()
        self.answered: Answered | None = None
        self._start_digest: str | None = None  # of the file in the folder that `start` names

    # ------------------------------------------------------------------ building

    def collator(self) -> DistillCollator:
        """How the DataModule's slots become batches."""
        return DistillCollator(self.tokenizer, self.queries)

    def check(self, trainer: L.Trainer) -> None:
        """Refuse what can be known to be wrong before any process is started.

        Raises:
            ValueError: naming the setting.
        """
        if trainer.precision in ("bf16-true", "16-true"):
            raise ValueError(
                f"trainer.precision {trainer.precision}: adapters train in 32 bits; set bf16-mixed or 32-true, and "
                "model.backbone.dtype to bfloat16 to halve the language model"
            )
        if isinstance(self.start, str):
            file_in(Path(self.start))

    @property
    def student(self) -> Student:
        return self.built

    def configure_model(self) -> None:
        """Load the backbone; in a run, make the start and ask the teacher; then put the adapters in."""
        if self.model is not None:
            return
        with torch.device("cpu"):  # Lightning would have tensors made on the GPU, generators of random numbers not
            backbone = load_backbone(self.backbone_config, self.tokenizer)
            self.adapters.check(backbone)  # not after hours of asking the teacher
            start = self._prepared(backbone) if self._fitting else {}
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                self.model = Student(backbone, self.adapters, start)

    @property
    def _fitting(self) -> bool:
        return self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING

    def editor(self) -> DistilledEditor:
        """This module as an editor (contract of modules/editor.py)."""
        return DistilledEditor(self.student.backbone, self.requests, self.student.terms())

    @contextmanager
    def original(self) -> Iterator[Backbone]:
        """The unedited model: no adapters, no start."""
        with adapters_off(self.student.language_model):
            yield self.student.backbone

    # ------------------------------------------------------------------ before training

    def _prepared(self, backbone: Backbone) -> dict[str, Summed]:
        """Take the edits from the training data, ask the teacher about them, and make the student's start."""
        trainer = self.trainer
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "calibration_records"):
            raise TypeError("DistillMIKE distils the records of its DataModule: give it datamodules.EditDataModule")
        records = sorted(datamodule.calibration_records(sys.maxsize), key=lambda r: (r.id, r.request.statement))
        self.requests = tuple(dict.fromkeys(r for record in records for r in record.requests))
        self._check_validation(datamodule.validation_records())
        named = self._named_start(backbone) if isinstance(self.start, str) else {}
        backbone.model.to(trainer.strategy.root_device)  # type: ignore[arg-type]
        weights = trainer.strategy.broadcast(weights_hash(backbone.model) if trainer.is_global_zero else "")
        self.answered = self._taught(backbone, records, weights)
        return self._made_start(self.start, backbone, weights) if isinstance(self.start, Editor) else named

    def _made_start(self, start: Editor, backbone: Backbone, weights: str) -> dict[str, Summed]:
        """What the student starts from, which rank 0 makes: it must be the same on all ranks, bit by bit. A run that
        goes on has it from its checkpoint in the end."""
        trainer, made = self.trainer, ""
        rank_zero_info(f"start: {len(self.requests):,} edits by {start.name} ...")
        with _InfiniteBarrier():
            if trainer.is_global_zero:
                made = str(make(start, backbone, self.requests, weights, self.teaching.where()))
        made = trainer.strategy.broadcast(made)
        rank_zero_info(f"start: {made}")
        return read(Path(made), backbone)

    def _named_start(self, backbone: Backbone) -> dict[str, Summed]:
        """The edits in the folder that the configuration names."""
        folder = Path(str(self.start))
        rank_zero_info(f"start: {folder}")
        terms = read(folder, backbone)
        self._start_digest = digest(folder)
        return terms

    def _check_validation(self, records: Sequence[EditRecord]) -> None:
        known = {r.statement for r in self.requests}
        if problem := unknown_among([r for record in records for r in record.requests], known):
            raise ValueError(
                f"data.val: {problem}; validation is on what is distilled: give it the sources of data.train"
            )

    def _taught(self, backbone: Backbone, records: Sequence[EditRecord], weights: str) -> Answered:
        """The teacher's answers to all questions; those that are not on disk are asked now, shared out over ranks."""
        trainer, options = self.trainer, self.teaching
        rank, world = trainer.global_rank, trainer.world_size
        blocks = _blocks(records, self.queries)
        files: dict[int, str] = {}
        total = sum(map(len, blocks[rank::world]))
        quiet = rank > 0 or trainer.progress_bar_callback is None
        begin = time.perf_counter()
        with (
            _InfiniteBarrier(),
            self.teacher.edit(backbone, self.requests) as edited,
            tqdm(total=total, desc="teacher", unit="question", disable=quiet) as bar,
        ):
            if not hasattr(edited, "contexts"):
                raise ValueError(
                    f"model.teacher: {self.teacher.name} puts nothing before prompts, so there is nothing to distil; "
                    "take MIKE, or another editor that does"
                )
            for i in range(rank, len(blocks), world):
                asked = asked_of(edited, backbone, blocks[i])  # type: ignore[arg-type]
                file = file_of(options, backbone, weights, asked)
                if file.is_file():
                    bar.update(len(asked))
                else:
                    teach(options, backbone, asked, file, bar.update)
                files[i] = str(file)
        every = _gathered(files)
        answered = Answered([of[i] for i in range(len(blocks)) for of in every if i in of])
        rank_zero_info(f"teacher: {answered.said()} ({time.perf_counter() - begin:.0f} s)")
        return answered

    # ------------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        self.register_external(head_of(self.student.language_model))

    def losses(self, batch: DistillBatch) -> dict[str, Tensor]:
        """The loss and its parts for one micro-batch: `ike` of questions in scope, `base` of the others, each a share
        of the mean over all."""
        again = self.gradient_checkpointing and torch.is_grad_enabled()
        with checkpointed(self.student.language_model) if again else nullcontext():  # type: ignore[arg-type]
            return self._losses(batch)

    def _losses(self, batch: DistillBatch) -> dict[str, Tensor]:
        assert self.answered is not None, "the teacher is asked when a run begins"
        config, student = self.loss, self.student
        answer = batch.queries_answer
        states = []
        for first, end, width in batch.passes:
            rows = slice(first, end)
            hidden = student(batch.queries[rows, :width], batch.queries_mask[rows, :width])  # [rows, width, d]
            states.append(hidden[:, :-1][answer[rows, 1:width]])  # the token at i is predicted at i - 1
        row = answer.nonzero(as_tuple=True)[0]  # [n]
        taught, inside = self.answered.look_up(batch.asked, row.device)
        kl = kept_kl(torch.cat(states), head_of(student.language_model), taught, config.chunk)
        asked = batch.record.bincount(minlength=len(batch))
        each = mean_per_row(kl, row, len(batch.asked)) / (asked[batch.record] * len(batch))  # [B]
        parts = {"ike": (each * inside).sum(), "base": (each * ~inside).sum()}
        return {"loss": config.ike_weight * parts["ike"] + config.base_weight * parts["base"], **parts}

    def configure_optimizers(self) -> Any:
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            [p for p in self.student.parameters() if p.requires_grad],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
        return self.scheduled(optimizer, config.share)

    # ------------------------------------------------------------------ checkpoints

    def trained_names(self) -> set[str]:
        """The tensors of a checkpoint: the adapters."""
        return {n for n, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        kept: dict[str, Any] = {"requests": [asdict(r) for r in self.requests]}
        if self._start_digest:  # perhaps a hundred times the adapters' size, and on disk already
            kept["start_digest"] = self._start_digest
        else:
            start = moved(self.student.start, torch.device("cpu"))
            kept["start"] = {n: {k: v for k, v in vars(t).items() if v is not None} for n, t in start.items()}
        checkpoint[KEPT] = kept

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the edits and the start from a checkpoint; the adapters come by their names.

        Raises:
            ValueError: for a checkpoint of other edits, or that does not fit this configuration; where the start is
                neither in the checkpoint nor, unchanged, in the folder that the configuration names.
        """
        self.configure_model()
        names = self.trained_names()
        saved = set(checkpoint.get("state_dict", names))  # a strategy that loads by itself also checks
        if saved != names or KEPT not in checkpoint:
            raise ValueError(misfit(names, saved))
        requests = tuple(EditRequest(**r) for r in checkpoint[KEPT]["requests"])
        if self.requests and set(requests) != set(self.requests):
            both = len(set(requests) & set(self.requests))
            raise ValueError(
                f"the checkpoint is of {len(requests)} edits, and data.train has {len(self.requests)}, {both} of them "
                "the same: go on with the same data, or begin a run of its own"
            )
        self.requests = requests
        if (wanted := checkpoint[KEPT].get("start_digest")) is None:
            self._start_digest = None
            self.student.start = {n: _kept_sum(t) for n, t in checkpoint[KEPT]["start"].items()}
        elif wanted != self._start_digest:
            self.student.start = self._named_start(self.student.backbone) if isinstance(self.start, str) else {}
            if wanted != self._start_digest:
                raise ValueError(
                    "model.start: the checkpoint's run started from edits in a folder, and those that this setting "
                    "names are others, or none; set it (in the run's config.yaml) to that folder"
                )


def _blocks(records: Sequence[EditRecord], config: DistillQueries) -> list[list[Question]]:
    """The questions of a few records each, every question once."""
    seen: set[Question] = set()
    blocks = []
    for at in range(0, len(records), BLOCK):
        asked = dict.fromkeys(q for record in records[at : at + BLOCK] for q in questions_of(record, config))
        blocks.append([q for q in asked if q not in seen])
        seen.update(asked)
    return [block for block in blocks if block]


def _gathered(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _kept_sum(tensors: dict[str, Tensor]) -> Summed:
    """A sum of a checkpoint; of earlier ones, a term of one row."""
    return as_sum(tensors["a"][0], tensors["b"][0]) if tensors["a"].dim() == 3 else Summed(**tensors)
