"""bf16-mixed on one process, with gradient clipping, as the configs for SmolLM2 have it."""

import math
from pathlib import Path

import pytest

from trainers.cli import TrainingCLI


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", ["incomes_tiny", "mend_tiny"])
def test_two_steps_and_a_validation(config: str, tmp_path: Path) -> None:
    args = [f"--config={config}", f"--run_dir={tmp_path}", "--trainer.precision=bf16-mixed", "--trainer.max_steps=2"]
    cli = TrainingCLI([*args, "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"])
    assert cli.trainer.gradient_clip_val
    cli.check()
    cli.trainer.fit(cli.model, cli.datamodule)
    assert cli.trainer.global_step == 2
    assert math.isfinite(cli.trainer.callback_metrics["train/loss"])
