"""What all readers share: files to rows, rows to records, and errors that name file, record and field.

A reader is a function `path -> iterator of EditRecord` around a pure function `row -> EditRecord`. The pure function
takes what it needs from the row (see `fields`) and raises KeyError, TypeError or ValueError naming the field;
`read_all` adds the file and the record. Records are never reordered or deduplicated.
"""

import gzip
import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from datamodules.readers.errors import DataError, MalformedRecord, SkippedRecords
from datamodules.readers.hub import hub_file, hub_rows, is_hub
from datamodules.records import EditRecord

OnError = Literal["raise", "skip"]
Convert = Callable[[Mapping[str, Any], int], EditRecord]


def load_rows(path: str | Path) -> Iterator[Any]:
    """The rows of a JSON array or of JSON Lines, in the file's order; gzipped if the name ends in `.gz`.

    JSON Lines are read one by one, an array at once. Blank lines are passed over. `hub:...` is read from the Hugging
    Face hub, see `readers.hub`.

    Raises:
        FileNotFoundError: if there is no such file (at the call).
        DataError: if the file is empty, holds no rows, or is not JSON or utf-8 (while reading; it names the line), and
            if the hub does not give it (at the call).
    """
    file = _file(path)
    return hub_rows(path) if file is None else _rows(file)


def load_keyed(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Key and value of each member of a file that is one JSON object, in the file's order; the rest as `load_rows`.

    Raises:
        FileNotFoundError, DataError: see `load_rows`; DataError also if the file is not one JSON object.
    """
    file = _file(path)
    if file is None:
        raise DataError(
            f"{path} names a split, but this format is one JSON object: name the file, as hub:...:file.json"
        )
    return _members(file)


def _file(path: str | Path) -> Path | None:
    """The file on disk, or None for a split on the hub."""
    file = hub_file(path) if is_hub(path) else Path(path)
    if file is not None and not file.is_file():
        raise FileNotFoundError(f"no data file {path} (working directory {Path.cwd()}); check the configured path")
    return file


def _members(path: Path) -> Iterator[tuple[str, Any]]:
    with _readable(path), _opened(path) as file:
        content = file.read()
    members = _parse(content, path, 1, "the file must be one JSON object") if content.strip() else {}
    if not isinstance(members, dict):
        raise DataError(f"{path} must be one JSON object, not {type(members).__name__}")
    if not members:
        raise DataError(f"{path} holds no records; fetch it again, or take it out of the configuration")
    yield from members.items()


def _rows(path: Path) -> Iterator[Any]:
    empty = True
    with _readable(path):
        for row in _decoded(path):
            empty = False
            yield row
    if empty:
        raise DataError(f"{path} holds no records; fetch it again, or take it out of the configuration")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged or not utf-8 ({error}); fetch it again, or convert it to utf-8") from error


def _opened(path: Path) -> IO[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8-sig")


def _decoded(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        is_array = next((line for line in file if line.strip()), "").lstrip().startswith("[")
        file.seek(0)
        if is_array:
            yield from _parse(file.read(), path, 1)
        else:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _parse(line, path, number)


_LINES = "the file must be a JSON array or JSON Lines (one object a line)"


def _parse(text: str, path: Path, first_line: int, shape: str = _LINES) -> Any:
    try:
        return json.loads(text.rstrip())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {first_line + error.lineno - 1}: broken JSON ({error.msg}); {shape}, so fetch it again or "
            f"correct that line"
        ) from error


def read_all(
    rows: Iterable[Any], path: str | Path, convert: Convert, on_error: OnError = "raise"
) -> Iterator[EditRecord]:
    """Convert each row of `path` by `convert(row, index)`, in order.

    Args:
        path: names the source in messages.
        convert: raises KeyError (a missing field), TypeError or ValueError on a row that is not of the format.
        on_error: "raise" stops at the first malformed record; "skip" passes over it, and warns once (`SkippedRecords`),
            at the end or where the iterator is closed, with the number of skipped records and the first reason.

    Raises:
        MalformedRecord: at a malformed record, under "raise".
        ValueError: for another `on_error` (at the call).
        DataError: if the source has no records or none that can be read.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
    return _converted(rows, path, convert, on_error)


def _converted(rows: Iterable[Any], path: str | Path, convert: Convert, on_error: OnError) -> Iterator[EditRecord]:
    total, skipped, first = 0, 0, ""
    try:
        for total, row in enumerate(rows, 1):
            try:
                record = convert(_object(row), total - 1)
            except (KeyError, TypeError, ValueError) as error:
                problem = f"record {total - 1}{_published_id(row)}: {_reason(error)}"
                if on_error == "raise":
                    remedy = "correct or remove it, or pass over such records with on_error='skip'"
                    raise MalformedRecord(f"{path}, {problem}; {remedy}") from error
                first = first or problem
                skipped += 1
            else:
                yield record
    finally:  # also where no more are wanted
        if 0 < skipped < total:
            warnings.warn(
                f"skipped {skipped} of {total} records of {path}: first: {first}", SkippedRecords, stacklevel=2
            )
    if skipped == total:
        reason = f"none of its {total} records can be read, first: {first}" if total else "it holds no records"
        raise DataError(f"nothing to read in {path}: {reason}; check that the path and the format belong together")


def _object(row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise TypeError(f"a record must be a JSON object, not {type(row).__name__}")
    return row


def _published_id(row: Any) -> str:
    found = [row[key] for key in ("case_id", "id") if key in row] if isinstance(row, Mapping) else []
    return f" (id {found[0]})" if found else ""


def _reason(error: Exception) -> str:
    return f"field {error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
