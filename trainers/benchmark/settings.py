"""Finished cells of another setting whose files stand where a benchmark's own would: refused before any work.

The name of a cell's file tells data set, run and editor, and not what else its result hangs on, such as the seed.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SHOWN = 6  # differences that a message names
COMPARED = ("editor", "protocol", "judging", "queries_per_kind", "seed", "facts", "weights", "records_hash")
BACKBONE = ("source", "revision", "dtype")  # what may have made other weights
HASHES = {
    "weights": "the model's weights",
    "records_hash": "the records and what is asked of them",
    "facts.export": "the exported editor's files",
}
ABSENT = "absent"
NOT_TOLD = "in what its file does not tell: records, weights, options of the protocol, or --batch_size"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a cell's file tells otherwise than the cell does, in words. What a file of before does not tell is passed
    over.

    Args:
        found: what the file tells.
        wanted: what the cell's own would, see `trainers.benchmark.files.Files.about`; JSON values.
    """
    pairs = [(name, found[name], wanted[name]) for name in COMPARED if name in found]
    of_model = ("overrides", *(BACKBONE if found.get("weights") != wanted["weights"] else ()))
    there = found.get("backbone", {})
    pairs += [(f"backbone.{name}", there[name], wanted["backbone"][name]) for name in of_model if name in there]
    words = [text for name, there, now in pairs for text in _apart(name, there, now)]
    files = found.get("files", {})
    words += [f"the content of {name} differs" for name in files if files[name] != wanted["files"].get(name)]
    return words or [f"it differs {NOT_TOLD}"]


def of_other_settings(apart: Mapping[str, Sequence[str]], out: Path) -> str:
    """That finished cells are of another setting, and in what, as a sentence's beginning.

    Args:
        apart: `differences` of each, by the name of its file.
    """
    first, count = next(iter(apart)), len(apart)
    counted = Counter(text for words in apart.values() for text in words)
    words = [text + (f" ({n} of them)" if n < count else "") for text, n in counted.most_common(SHOWN)]
    words += [f"and {len(counted) - SHOWN} more"] if len(counted) > SHOWN else []
    those = f"{count} finished cells, such as cells/{first}.json, are" if count > 1 else f"cells/{first}.json is"
    return f"benchmark.out {out}: {those} of another setting: {'; '.join(words)}"


def _apart(name: str, there: Any, now: Any) -> Iterator[str]:
    """The leaves at which two JSON values differ."""
    if there == now:
        return
    if isinstance(there, Mapping) and isinstance(now, Mapping):
        for key in {**there, **now}:
            yield from _apart(f"{name}.{key}", there.get(key, ABSENT), now.get(key, ABSENT))
    elif name in HASHES:
        yield f"{HASHES[name]} differ"
    else:
        yield f"{name} is {_short(there)} there and {_short(now)} now"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
