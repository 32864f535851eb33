"""Which figures of a benchmark stand beside each other, and what they are called where others are much like them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from modules.modes import stops_of

Result = Mapping[str, Any]


class Group(NamedTuple):
    """One number of edits of one run on one data set.

    Args:
        batch: records of one edit.
        asked: of how many of the records; None: of all.
        records: of the whole run; None for `batch`, where that is the number of edits.
    """

    dataset: str
    mode: str
    batch: int
    asked: int | None
    records: int | None
    edits: int


def group_of(result: Result, edits: int) -> Group:
    """Where a cell's figures at a number of edits belong."""
    mode, asked = result["mode"], result.get("asked")  # unlike batch, not in files of before
    records = None if mode == "batch" else result["edits"][-1]
    return Group(result["dataset"], mode, result["batch"], asked, records, edits)


def numbers(result: Result) -> Sequence[int]:
    """The numbers of edits that a cell has figures of, or will have."""
    if result["mode"] == "single":
        return [1]
    if result["mode"] == "batch":
        return result["edits"]
    return stops_of(result["edits"][-1], result["batch"], result["edits"])


def apart(group: Group, others: Iterable[Group]) -> str:
    """What tells a group from others that would be called the same, after commas; empty where nothing has to."""
    words = {
        "batch": f"by {group.batch}",
        "asked": "all asked" if group.asked is None else f"{group.asked} asked",
        "records": f"run of {group.records} records",
    }
    others = list(others)
    differ = [name for name in words if any(getattr(other, name) != getattr(group, name) for other in others)]
    return "".join(f", {words[name]}" for name in differ)
