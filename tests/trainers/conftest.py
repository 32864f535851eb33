"""What the tests of several files build."""

from pathlib import Path

import pytest
from command_ends import TINY


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """A run of two steps on few records."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", *quiet]
