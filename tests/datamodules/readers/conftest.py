"""Files for the readers' tests: hand-made ones, and the published ones where they are at hand."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows as the ending of the name says: .json or .jsonl, and .gz."""

    def _write(rows: list[Any], name: str = "data.json") -> Path:
        path = tmp_path / name
        lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        content = (json.dumps(rows, ensure_ascii=False) if ".jsonl" not in name else lines).encode("utf-8")
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return _write


@pytest.fixture
def real() -> Callable[[str], Path]:
    """The path of a published file; the test is skipped where the data are not beside the repository."""
    folder = Path(os.environ.get("PALIMPSEST_DATA", REPOSITORY.parent / "shared" / "data"))

    def _real(name: str) -> Path:
        if not (folder / name).is_file():
            pytest.skip(f"no {name} under {folder}; set PALIMPSEST_DATA to the folder of published data")
        return folder / name

    return _real
