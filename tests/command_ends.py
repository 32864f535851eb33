"""What a command says as it ends, and the checkpoints that it finds."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from trainers.checkpoints.folder import digest, seal, stage
from trainers.checkpoints.single import STATE

TINY = ["--config", "incomes_tiny"]


def ends(function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """What a program says as it ends with an error, and its exit code."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, redirect_stderr(said), redirect_stdout(said):
        function(*args)
    message = f"{said.getvalue()}{end.value.code if isinstance(end.value.code, str) else ''}"
    return message, end.value.code


def save(folder: Path, step: int, content: bytes = b"weights") -> Path:
    path = folder / f"step{step}.ckpt"
    staged = stage(path)
    (staged / STATE).write_bytes(content)
    seal(staged, path, digest(staged), {"step": step, "kind": "file", "world_size": 1})
    return path
