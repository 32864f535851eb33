"""Plain text from anywhere, one piece at a time."""

import gzip
from collections.abc import Iterator
from functools import cache
from hashlib import file_digest
from pathlib import Path

import datasets

from datamodules.files import sought


def read_texts(source: str, field: str = "text", seed: int = 0) -> Iterator[str]:
    """The texts of a source.

    Args:
        source: a file, packed or not (`datamodules.files` says where it is looked for), whose paragraphs (lines that
            are not empty) are the texts; or else a Hugging Face data set as NAME, NAME:CONFIG or NAME:CONFIG:SPLIT,
            which is streamed in an order drawn by `seed`.
        field: the column of such a data set.

    Raises:
        ValueError: where it is neither, or has no such column.
    """
    path = sought(source)
    if path and path.is_file():
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            yield from (line.strip() for line in lines if line.strip())
        return
    name, config, split = (*source.split(":"), "", "")[:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text {source!r} is neither a file nor a data set that can be read: {str(error)[:300]}. Give a file, "
            "NAME:CONFIG:SPLIT of a Hugging Face data set, or `model` for text drawn from the model itself"
        ) from error
    for row in rows.shuffle(seed=seed, buffer_size=10_000):
        if field not in row:
            raise ValueError(f"data set {source!r} has no column {field!r}; it has {', '.join(row)}")
        yield row[field]


def identity(source: str) -> str:
    """What tells a source from others: the hash of a file's content, or a data set's name."""
    path = sought(source)
    if not (path and path.is_file()):
        return source
    stat = path.stat()
    return _digest(path, stat.st_size, stat.st_mtime_ns)


@cache
def _digest(path: Path, size: int, changed: int) -> str:
    """Of a file's content, read once while its size and time of change stay the same."""
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()
