"""Rows of tables. JSON is read by `datamodules.readers.base.load_rows`."""

import csv
import gzip
from pathlib import Path
from typing import IO, Any


def tsv(path: Path, columns: int) -> list[list[str]]:
    """Rows of a tab-separated file without its header; a quotation mark is a character like any other (GLUE).

    Raises:
        ValueError: for a row of another number of columns; it names the line.
    """
    with _opened(path) as file:
        lines = file.read().split("\n")
    rows = []
    for number, line in enumerate(lines[1:], 2):
        cells = line.rstrip("\r").split("\t")
        if line and len(cells) != columns:
            raise ValueError(f"{path}, line {number}: {len(cells)} columns, {columns} are needed, separated by tabs")
        if line:
            rows.append(cells)
    return rows


def comma_separated(path: Path) -> list[list[str]]:
    """Rows of a comma-separated file, the header too where there is one."""
    with _opened(path) as file:
        return [row for row in csv.reader(file) if row]


def _opened(path: Path) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig", newline="")
