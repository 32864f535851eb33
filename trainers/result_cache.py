"""Results of editors that need no training, kept on disk: the same editor on the same weights and records is run once.

A file holds what its result hangs on in plain words beside the result, and is read only where all of it is the same.
"""

import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

import datamodules
import modules
from modules.kept_tensors import folder as kept_folder
from trainers.written import write_json


class ResultCache:
    """A folder of results.

    Args:
        folder: by default "results" in the folder that the environment variable PALIMPSEST_CACHE names, or in
            ~/.cache/palimpsest.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else kept_folder() / "results"

    def get(self, key: dict[str, Any]) -> dict[str, Any] | None:
        """The result that was put there under this key (JSON values); None where there is none, or none to be read."""
        try:
            found = json.loads(self._file(key).read_text(encoding="utf-8"))
            return found["result"] if found["key"] == key else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            rank_zero_warn(f"{self._file(key)} cannot be read and is made anew: {error!r}")
            return None

    def put(self, key: dict[str, Any], result: dict[str, Any]) -> None:
        """Keep a result, whole or not at all; where nothing can be written it is not kept, with a warning."""
        try:
            write_json(self._file(key), {"key": key, "result": result})
        except OSError as error:
            rank_zero_warn(f"the result is not kept for later runs, {self.folder} cannot be written: {error}")

    def _file(self, key: dict[str, Any]) -> Path:
        return self.folder / f"{sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]}.json"


@cache
def code() -> str:
    """A hash of the code of editors, metrics and data: what is corrected must not be answered from an old cache."""
    digest = sha256()
    for package in (datamodules, modules):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()
