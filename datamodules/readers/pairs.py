"""Pairs of texts, of which the first is compressed and helps to predict the second: the pre-training data of InComeS.

Any table will do whose rows have an edit and a text that follows from it (abstract and title, passage and answer, ...):
the columns are arguments.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import fields
from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.hub import load_table
from datamodules.records import EditRecord, EditRequest, Query


def read_pairs(
    source: str | Path | Iterable[Mapping[str, Any]],
    edit: str,
    text: str | list[str],
    stem: str | None = None,
    on_error: OnError = "raise",
    name: str | None = None,
    key: str | None = None,
) -> Iterator[EditRecord]:
    """Read text pairs from a JSON or JSON Lines file, or from rows.

    A record's edit is free text, and its one rephrase is the query `stem` with the answer `text`. Such tables have no
    ids, so a record's is `<name>-<index>`.

    Args:
        edit: the column of the edit. Columns may be dotted paths, such as "answers.text"; the first element of a
            list on the path is taken.
        text: the column of the text to be predicted; with `key`, the columns of the choices, or the one column that
            holds them as a list.
        key: of a multiple-choice question, the column that says which choice is right: its place from 0, or its
            letter from A (digits as text count from 1).
        stem: the column of a prompt before the text, such as a question; without it the text is predicted from its
            start.
        name: names the source in ids and messages; by default the file's stem, or "pairs" for rows.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`; ValueError also if there are no rows.
        MalformedRecord: for a row in which a column is missing, empty or not text.
    """
    if isinstance(source, str | Path):
        rows, origin, prefix = load_rows(source), str(source), name or fields.stem(source)
    else:
        rows, origin, prefix = source, name or "pairs", name or "pairs"

    def convert(row: Mapping[str, Any], index: int) -> EditRecord:
        prompt = fields.text(row, stem) if stem else ""
        request = EditRequest(text=fields.text(row, edit))
        answer = fields.choice(row, text, key) if key else fields.text(row, str(text))
        return EditRecord(f"{prefix}-{index}", (request,), rephrases=(Query(prompt, (answer,)),))

    return read_all(rows, origin, convert, on_error)


def read_hub(
    name: str,
    subset: str | None,
    split: str,
    edit: str,
    text: str | list[str],
    stem: str | None = None,
    revision: str | None = None,
    on_error: OnError = "raise",
    key: str | None = None,
) -> Iterator[EditRecord]:
    """Read text pairs from a Hugging Face dataset (or a local folder of data files), kept on disk and memory-mapped.

    No code of the dataset's is run, so datasets that need a loading script are refused. The remaining arguments and
    errors are those of `read_pairs`.

    Raises:
        DataError: if the dataset cannot be loaded, for whatever reason.
    """
    return read_pairs(load_table(name, subset, split, revision), edit, text, stem, on_error, name=name, key=key)
