"""Readers: published data formats to `EditRecord`s, one format a file; `read` finds them by name."""

import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from datamodules.records import EditRecord

# By name rather than by import: a reader is loaded when it is asked for.
_READERS = {
    "auto": "auto.read_auto",
    "counterfact": "counterfact.read_counterfact",
    "dune": "dune.read_dune",
    "facts": "facts.read_facts",
    "facts_uniedit": "facts_uniedit.read_facts_uniedit",
    "hub": "pairs.read_hub",
    "knowedit": "knowedit.read_knowedit",
    "mquake": "mquake.read_mquake",
    "pairs": "pairs.read_pairs",
    "records": "own.read_records",
    "ripple": "ripple.read_ripple",
    "uniedit": "uniedit.read_uniedit",
    "zsre": "zsre.read_zsre",
}
FORMATS = tuple(_READERS)


def read(format: str, path: str | Path | None = None, **options: Any) -> Iterator[EditRecord]:
    """The records of a file of a named format, in the file's order.

    Args:
        format: one of `FORMATS`.
        path: the file, or a dataset's name for "hub"; a format that generates its records may do without.
        options: keyword arguments of that format's reader.

    Raises:
        ValueError: for an unknown format (the message lists the known ones), or an unknown or missing option.
        Otherwise what the reader raises.
    """
    if format not in _READERS:
        raise ValueError(f"unknown format {format!r}; known formats: {', '.join(FORMATS)}")
    module, function = _READERS[format].split(".")
    reader: Callable[..., Iterator[EditRecord]] = getattr(import_module(f"{__name__}.{module}"), function)
    arguments = () if path is None else (path,)
    signature = inspect.signature(reader)
    try:
        signature.bind(*arguments, **options)
    except TypeError as error:
        known = ", ".join(signature.parameters)
        raise ValueError(f"format {format!r}: {error}; the parameters of its reader are: {known}") from error
    return reader(*arguments, **options)
