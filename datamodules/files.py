"""Where files that a user names are looked for."""

import gzip
import os
from collections.abc import Mapping
from hashlib import file_digest
from pathlib import Path
from typing import Any

DATA_FOLDER = "PALIMPSEST_DATA"  # the environment variable that names a folder of data


def located(path: str | Path, what: str = "") -> Path:
    """A file or folder, looked for from the working directory and then below the folder that PALIMPSEST_DATA names, a
    file under this name or with or without a final .gz.

    Args:
        what: it is, for the message.

    Raises:
        FileNotFoundError: names the path and the places where it was looked for.
    """
    there = sought(path)
    if there is None:
        hint = "" if os.environ.get(DATA_FOLDER) else f"; {DATA_FOLDER}, which may name a folder of data, is not set"
        raise FileNotFoundError(f"no file {path}{what}: looked in {' and in '.join(map(str, _places()))}{hint}")
    return there


def sought(path: str | Path) -> Path | None:
    """The same, or None where there is nothing."""
    given = Path(path).expanduser()
    other = given.with_suffix("") if given.suffix == ".gz" else Path(f"{given}.gz")
    for name in (given, other):  # packed or not, as it comes
        for place in _places():
            if (found := place / name).exists():
                return found.resolve()
    return None


def hashes(values: Any) -> dict[str, str]:
    """Of every file that JSON values name, however deep: the text that names it, and a hash of what it holds, unpacked.

    Folders, and texts by which `sought` finds nothing, are passed over.
    """
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (list, tuple)):
        return {name: found for value in values for name, found in hashes(value).items()}
    try:
        there = sought(values) if isinstance(values, str) else None
    except (OSError, ValueError, RuntimeError):  # too long for a name, or of characters that no name has
        return {}
    if there is None or not there.is_file():
        return {}
    with gzip.open(there) if there.suffix == ".gz" else there.open("rb") as file:
        return {values: file_digest(file, "sha256").hexdigest()}


def _places() -> list[Path]:
    folder = os.environ.get(DATA_FOLDER)
    return [Path.cwd(), *([Path(folder).expanduser()] if folder else [])]
