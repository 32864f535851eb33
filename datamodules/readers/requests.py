"""A user's own edits: what `trainers.edit` is to make true."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import load_rows
from datamodules.readers.errors import MalformedRecord
from datamodules.records import EditRequest


def read_requests(path: str | Path) -> list[EditRequest]:
    """Edits from a file.

    `.json`, `.jsonl` (or either with .gz): objects with `prompt` and `target` (or EasyEdit's `target_new`) and perhaps
    `subject`, or with `text`, a whole statement. Any other file: one statement a line.

    Raises:
        ValueError: for a file that is missing, empty or not utf-8.
        MalformedRecord: naming file, row and field.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not name.endswith((".json", ".jsonl")):
        if not path.is_file():
            raise ValueError(f"no such file of edits: {path}")
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark, which is no text
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in utf-8 ({error}); convert it") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{path} is empty: write one edit a line, or JSON with prompt and target")
        return [EditRequest(text=line) for line in lines]
    return [_request(row, i, path) for i, row in enumerate(load_rows(path))]


def _request(row: Any, index: int, path: Path) -> EditRequest:
    if not isinstance(row, Mapping):
        raise MalformedRecord(f"{path}, row {index}: needs `prompt` and `target`, or `text`, got {row!r}")
    target = row.get("target", row.get("target_new", ""))
    values = {"prompt": row.get("prompt", ""), "target": target, "text": row.get("text"), "subject": row.get("subject")}
    wrong = [name for name, value in values.items() if value is not None and not isinstance(value, str)]
    try:
        if wrong:
            raise ValueError(f"field {wrong[0]!r} must be a string, got {values[wrong[0]]!r}")
        return EditRequest(**values)
    except ValueError as error:
        raise MalformedRecord(f"{path}, row {index}: {error}") from None
