"""Reading a published file whose format is not named: its first record's keys tell.

EasyEdit's `data` folder can thus be used as it is: zsre/*.json, counterfact/*.json, portability/*/*.json, KnowEdit's
benchmark folders, MQuAKE and the rest by path alone.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers import read
from datamodules.readers.base import OnError, load_keyed, load_rows
from datamodules.records import EditRecord

Row = Mapping[str, Any]


def _has(*keys: str) -> Callable[[Row], bool]:
    return lambda row: all(key in row for key in keys)


def _knowedit(row: Row) -> bool:
    flat_locality = "locality_prompt" in row
    return _has("prompt", "target_new")(row) and not flat_locality


def _counterfact(row: Row) -> bool:
    easyedit = _has("prompt", "target_new", "ground_truth", "rephrase_prompt")(row)
    by_kind = isinstance(row.get("locality"), Mapping) or isinstance(row.get("portability"), Mapping)
    return isinstance(row.get("requested_rewrite"), Mapping) or (easyedit and not by_kind)


# What the first record of each format has. A file may be of several: then its reader must be named.
_SIGNS: dict[str, Callable[[Row], bool]] = {
    "counterfact": _counterfact,
    "dune": lambda row: "test_inputs" in row and ("edits" in row or "edits:" in row),
    "knowedit": _knowedit,
    "mquake": lambda row: isinstance(row.get("requested_rewrite"), list) and "questions" in row,
    "records": _has("id", "requests", "rephrases"),
    "ripple": _has("edit", "Relation_Specificity", "Forgetfulness"),
    "uniedit": _has("edit", "generality", "locality"),
    "zsre": _has("src", "alt", "rephrase"),
}


def read_auto(path: str | Path, on_error: OnError = "raise", **options: Any) -> Iterator[EditRecord]:
    """Read a file (or UniEdit's folder, or `hub:...`) by the reader that its first record belongs to.

    Args:
        options: handed on to that reader.

    Raises:
        ValueError: if the first record is of no known format, or of several (the message names them); for options that
            the reader does not have. Otherwise what the reader raises.
    """
    return read(detected(path), path, on_error=on_error, **options)


def detected(path: str | Path) -> str:
    """The name of a file's format.

    Raises:
        ValueError: if none fits or several do; FileNotFoundError and the rest as `load_rows`.
    """
    row = _first(path)
    keys = ", ".join(map(str, list(row)[:12])) if isinstance(row, Mapping) else type(row).__name__
    fitting = [name for name, fits in _SIGNS.items() if isinstance(row, Mapping) and fits(row)]
    if not fitting:
        known = ", ".join(_SIGNS)
        raise ValueError(
            f"{path} is of no format that can be told ({known}); its first record has: {keys}; name a format"
        )
    if len(fitting) > 1:
        raise ValueError(f"{path} may be of format {' or '.join(fitting)}; say which; its first record has: {keys}")
    return fitting[0]


def _first(path: str | Path) -> Any:
    """The first record: a row, or of a file that is one object that object, or its first member where that is one."""
    if Path(path).is_dir():
        files = sorted(f for f in Path(path).iterdir() if f.name.endswith((".json", ".json.gz")))
        if not files:
            raise ValueError(f"{path} is a folder without data files (*.json); name a file")
        if (row := _first(files[0])) and isinstance(row, Mapping) and _SIGNS["uniedit"](row):
            return row
        raise ValueError(f"{path} is a folder; name one of its files: {', '.join(f.name for f in files[:12])}")
    try:
        row = next(load_rows(path))
    except ValueError as broken:  # an object over several lines is no JSON Lines
        try:
            row = dict(load_keyed(path))
        except ValueError:
            raise broken from None
    first = next(iter(row.values()), None) if isinstance(row, Mapping) else None
    keyed = isinstance(first, Mapping) and _SIGNS["uniedit"](first)
    return first if keyed else row
