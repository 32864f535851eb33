"""The settings of InComeS: loss, rates, adapters."""

import math
from dataclasses import dataclass, field
from typing import Literal


@dataclass
class LossConfig:
    """The terms of the loss (paper, eq. 1-3 and C.4). Each is a mean over a query's tokens, then over queries, so that
    the same records give the same update however they are split into pools, micro-batches and ranks.

    Args:
        ce_weight: of the cross-entropy weighted by edit sensitivity.
        kl_weight: of KL(teacher || student); 0 switches the distillation off (paper, table 6). With `weighted` off,
            too, no teacher is asked: for a model that does not answer such questions with the edit before them
            (`train/teacher_ce` tells), and would teach that.
        golden_weight: of -log p(right gist) at the tokens that predict the answer, the zero-gist being right out of
            scope; 0 as published, 0.05 in the paper's ablation.
        weighted: weight the cross-entropy by edit sensitivity (off: every token counts 1; paper, table 6).
        weight_scale: on the sensitivity; 1 in the paper, 0.5 in the released code.
        ce_on: `answer` tokens (released code) or `all` text tokens (paper, C.4).
        kl_on: `all` text tokens (released code) or `answer` tokens.
        chunk: tokens whose logits exist at one time.
    """

    ce_weight: float = 1.0
    kl_weight: float = 1.0
    golden_weight: float = 0.0
    weighted: bool = True
    weight_scale: float = 1.0
    ce_on: Literal["answer", "all"] = "answer"
    kl_on: Literal["answer", "all"] = "all"
    chunk: int = 1024

    def __post_init__(self) -> None:
        for name in ("ce_weight", "kl_weight", "golden_weight", "weight_scale"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.loss.{name} must not be negative, got {getattr(self, name)}")


@dataclass
class OptimizerConfig:
    """AdamW, linear warm-up, cosine decay to a floor (paper, appendix A).

    Args:
        lr: peak rate of the language model's parameters and the gist token.
        selection_lr: peak rate of selection; `lr` where None. 0 leaves selection as it was calibrated.
        min_lr_share: the floor, as a share of the peak.
        betas: shares that stay of the running first and second moment in each step.
        eps: added to the root of the second moment: an element whose gradients are not far above it moves little.
        weight_decay: what a parameter loses in each step, as a share of itself, times the rate.
        warmup_steps: of the linear warm-up, in optimizer steps.
        decay_steps: of warm-up and decay, in optimizer steps; None: the trainer's max_steps.
    """

    lr: float = 1e-5
    selection_lr: float | None = None
    min_lr_share: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 300
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if self.lr <= 0 or (self.selection_lr is not None and self.selection_lr < 0):
            raise ValueError(
                f"model.optimizer.lr must be positive and selection_lr not negative, got {self.lr}, {self.selection_lr}"
            )

    def share(self, step: int, decay_steps: int) -> float:
        """The rate at a step, as a share of its peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, decay_steps - self.warmup_steps))
        return self.min_lr_share + (1 - self.min_lr_share) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class LoraOptions:
    """Low-rank adapters on the active layers (`train: lora`)."""

    rank: int = 16
    alpha: int = 32
    targets: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
