"""Files that a command writes: refused before any work where they cannot be, and whole at any time."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write JSON values so that the file is whole at any time. JSON has no NaN and no infinity: null stands for them,
    with a warning (`modules.metrics.from_file` reads it)."""
    try:
        text = json.dumps(values, ensure_ascii=False, allow_nan=False)
    except ValueError:  # one number must not end hours of work
        found: list[str] = []
        text = json.dumps(_finite(values, "", found), ensure_ascii=False, allow_nan=False)
        rank_zero_warn(
            f"{path}: null stands for {len(found)} numbers that are NaN or infinite, the first is {found[0]}"
        )
    write_text(path, text + "\n")


def _finite(value: Any, place: str, found: list[str]) -> Any:
    """JSON values with None for numbers that are none, whose places are added to `found`."""
    if isinstance(value, Mapping):
        return {key: _finite(of, f"{place}/{key}", found) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(of, f"{place}/{i}", found) for i, of in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found.append(place.removeprefix("/"))
        return None
    return value


def check_file(path: Path, flag: str = "") -> None:
    """Make the folder of a file that is to be written, and refuse what cannot be one.

    Args:
        flag: what a user set it by, for the message.

    Raises:
        ValueError: for a folder, and where none can be made for the file or written to.
    """
    said = f"{flag} {path}".strip()
    if path.is_dir():
        raise ValueError(f"{said} is a folder; give a file in it, such as {path / 'results.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise ValueError(f"{said} cannot be written: {error.strerror}; give another file") from error


def check_folder(path: Path, flag: str) -> None:
    """Refuse what cannot be a folder that is written to. Nothing is made yet.

    Args:
        flag: what a user set it by, for the message.

    Raises:
        ValueError: where it, or what it would lie in, is a file or cannot be written to.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {path} cannot be made: {there} is a file; give another folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: {there} allows it not; give another folder")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time: to a temporary file beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)
    temporary.replace(path)
