"""This project's own record files: JSON Lines of `EditRecord.to_json`."""

import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.records import EditRecord


def read_records(path: str | Path, on_error: OnError = "raise") -> Iterator[EditRecord]:
    """Read records written by `EditRecord.to_json`, one a line (or a JSON array of them); ids are those in the file.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for an object that is not a record.
    """
    return read_all(load_rows(path), path, _record, on_error)


def _record(row: Mapping[str, Any], index: int) -> EditRecord:
    by_kind = [row[field] for field in ("locality", "portability")]
    if not all(isinstance(kinds, Mapping) for kinds in by_kind):
        raise TypeError("fields 'locality' and 'portability' must be objects of kinds")
    queries = chain(row["rephrases"], row["multi_hop"], *(kind for kinds in by_kind for kind in kinds.values()))
    # a text in place of the list would be read as one answer a letter
    if not all(isinstance(query["answers"], list) for query in queries):
        raise TypeError("field 'answers' of a query must be a list of texts")
    return EditRecord.from_json(json.dumps(row))
