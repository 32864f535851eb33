"""How value vectors are found: the settings of `values.py`."""

from dataclasses import dataclass
from typing import Literal

Place = Literal["mlp", "layer", "attention and mlp"]  # what a change is added to the output of


@dataclass
class EAC:
    """Editing Anchor Compression: only the coordinates that matter most keep a change (Xu et al. 2025, section 5).

    Stage 1 optimises all coordinates and scores each by |mean gradient * change|; stage 2 optimises those with the
    highest scores, the others being 0. Both paper and code score the change, not v* itself as the paper's eq. 3 reads.

    Args:
        keep: share of the coordinates that are kept. Paper: .15 to .2 for GPT2-XL, .05 to .1 for Llama-3-8B; code: .2
            (ROME), .05 (MEMIT).
        first_steps: of stage 1.
        steps: of stage 2. Paper: 10; code: 10 (ROME), 15 (MEMIT).
        warm_start: stage 2 begins with stage 1's change (ROME's code), else with none (MEMIT's).
        l1: strength of the weighted L1 norm, sum |delta| / (score + epsilon). Paper: 5e-7; ROME's code does not add it.
        l2: strength of ||delta||^2 in place of the weight decay (paper: .5 GPT2-XL, 1e-3 Llama-3-8B); by default the
            usual weight decay (code).
        epsilon: added to the scores.
    """

    keep: float = 0.2
    first_steps: int = 10
    steps: int = 10
    warm_start: bool = True
    l1: float = 5e-7
    l2: float | None = None
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1 or self.first_steps < 1 or self.steps < 1 or self.l1 < 0 or (self.l2 or 0) < 0:
            raise ValueError(f"eac: keep must be in (0, 1], steps at least 1, l1 and l2 not negative, got {self}")


@dataclass
class ValueOptions:
    """How value vectors are found.

    Args:
        steps: evaluations of the loss, one more than there are updates, as released.
        lr: of Adam.
        weight_decay: see the top of the file.
        decay: `released`: ||delta|| / ||v0||^2; `relative`: ||delta|| / ||v0||.
        clamp: of ||delta||, in units of ||v0||.
        kl_factor: of the drift of "{subject} is a".
        kl_at: where drift is measured: after the whole phrase, as the papers have it, or at the subject's last token,
            where released code reads it.
        stop: an edit whose loss is below is done.
        eac: keep the coordinates that matter most; `steps` is then unused.
        chunk: rows (contexts of all edits) of one pass.
        group: edits of one search. Keys, values and states of all their contexts are held while it lasts.
        keep: values are kept on disk, and taken from there where the same is asked of the same model with the same
            edits in force (see `kept_values`). A run's seconds are then not the method's.

    Raises:
        ValueError: for steps, chunk or group below 1, a rate or clamp that is not positive, negative weights.
    """

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    decay: Literal["released", "relative"] = "released"
    clamp: float = 0.75
    kl_factor: float = 0.0625
    kl_at: Literal["phrase", "subject"] = "phrase"
    stop: float = 0.05
    eac: EAC | None = None
    chunk: int = 256
    group: int = 128
    keep: bool = False

    def __post_init__(self) -> None:
        if min(self.steps, self.chunk, self.group) < 1 or min(self.lr, self.clamp) <= 0:
            raise ValueError(f"values: steps, chunk and group must be at least 1, lr and clamp positive, got {self}")
        if min(self.weight_decay, self.kl_factor) < 0:
            raise ValueError(f"values: weight_decay and kl_factor must not be negative, got {self}")
        if self.kl_at not in ("phrase", "subject"):
            raise ValueError(f"values: kl_at must be phrase or subject, got {self.kl_at!r}")
