"""Taking fields from a row of a published file; what is missing or of the wrong type is named.

White space around a text is dropped: some published answers begin or end with a space, which would become a token of
the target. Nothing else about a text is changed.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.hub import is_hub
from datamodules.records import Query


def record_id(row: Mapping[str, Any], path: str | Path, index: int) -> str:
    """The published `case_id`, or `<filestem>-<index>` where there is none."""
    return str(row["case_id"]) if "case_id" in row else f"{stem(path)}-{index}"


def stem(path: str | Path) -> str:
    """A file's name without `.gz` and without its ending; of a split on the hub, name:split."""
    name = Path(path).name.removesuffix(".gz")
    if is_hub(path) and not name.endswith((".json", ".jsonl")):
        return name
    return Path(name.rpartition(":")[2] if is_hub(path) else name).stem


def text(row: Mapping[str, Any], field: str) -> str:
    """The text at a field, without surrounding white space.

    `field` may be a dotted path (`answers.text`); wherever a list stands on it, the list's first element is taken.

    Raises:
        KeyError: if the field is missing.
        TypeError: if it is not text.
        ValueError: if it is empty.
    """
    value: Any = row
    for name in [field] if field in row else field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            raise KeyError(field)
        value = value[name]
        while isinstance(value, list):
            value = value[0] if value else ""
    if not isinstance(value, str):
        raise TypeError(f"field {field!r} must be text, not {type(value).__name__}")
    if not value.strip():
        raise ValueError(f"field {field!r} is empty")
    return value.strip()


def choice(row: Mapping[str, Any], options: str | list[str], key: str) -> str:
    """The right one of several options: columns, or a (dotted) column that holds a list of texts.

    Args:
        key: the column with the right option's place from 0, or its letter from A, or its number as text from 1.

    Raises:
        KeyError, TypeError: if a field is missing or of the wrong type.
        ValueError: if the key names none of the options.
    """
    if isinstance(options, list):
        offered = [text(row, name) for name in options]
    else:
        value: Any = row
        for name in options.split("."):
            if not isinstance(value, Mapping) or name not in value:
                raise KeyError(options)
            value = value[name]
        offered = list(texts({options: value}, options))
    if key not in row:
        raise KeyError(key)
    right = row[key]
    if isinstance(right, str):
        right = int(right) - 1 if right.strip().isdigit() else ord(right.strip().upper()[:1] or "@") - ord("A")
    if not isinstance(right, int) or not 0 <= right < len(offered):
        raise ValueError(f"field {key!r} is {row[key]!r}, which is none of the {len(offered)} choices")
    return offered[right]


def texts(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """All non-empty texts of a field that holds a text or arbitrarily nested lists of texts; () if it is missing.

    Raises:
        TypeError: if something else than texts and lists is in it.
    """
    return tuple(_leaves(row.get(field), field))


def _leaves(value: Any, field: str) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item, field)
    elif isinstance(value, str):
        if value.strip():
            yield value.strip()
    elif value is not None:
        raise TypeError(f"field {field!r} must hold text or lists of text, not {type(value).__name__}")


def distinct(answers: Iterable[str]) -> tuple[str, ...]:
    """The answers without repetitions, in order."""
    return tuple(dict.fromkeys(answers))


def items(row: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    """The objects of a field that holds a list of objects.

    Raises:
        KeyError: if the field is missing.
        TypeError: if it is not a list of objects.
    """
    value = row[field]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise TypeError(f"field {field!r} must be a list of objects, not {type(value).__name__}")
    return value


def subject_in(prompt: str, row: Mapping[str, Any]) -> str | None:
    """The row's `subject`, or None where it has none or where it is not a part of the prompt, as a record demands."""
    subject = next(iter(texts(row, "subject")), None)
    return subject if subject and subject in prompt else None


def one_hop(row: Mapping[str, Any]) -> dict[str, tuple[Query, ...]]:
    """The portability question that EasyEdit adds to zsRE and CounterFact, as kind `one_hop`; {} where there is none.

    Shape: {"portability": {"Recalled Relation", "New Question", "New Answer"}}; the relation is not used.
    """
    if "portability" not in row:
        return {}
    return {"one_hop": (Query(text(row, "portability.New Question"), (text(row, "portability.New Answer"),)),)}
