"""Edits as text beside what a method keeps of them: edits.json in a folder."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from datamodules.records import EditRequest

EDITS = "edits.json"


def write_edits(folder: Path, requests: Sequence[EditRequest]) -> None:
    """Write the edits, in order."""
    lines = [asdict(r) for r in requests]
    (folder / EDITS).write_text(json.dumps(lines, ensure_ascii=False, indent=1), encoding="utf-8")


def in_force(requests: Sequence[EditRequest]) -> set[EditRequest]:
    """Of edits made one after another, those that no later one answers otherwise."""
    last = {r.prompt: r.target for r in requests if r.prompt}
    return {r for r in requests if not r.prompt or last[r.prompt] == r.target}


def left_to_make(requests: Sequence[EditRequest], made: Sequence[EditRequest]) -> list[EditRequest]:
    """Of the edits of a call, each once, those that are still to be made: all but those in force which no other one of
    the call answers otherwise."""
    each = list({r.statement: r for r in reversed(requests)}.values())[::-1]  # of two that are alike the later one
    answers = Counter(r.prompt for r in each if r.prompt)
    there = {r.statement for r in in_force(made)}
    return [r for r in each if r.statement not in there or answers[r.prompt] > 1]


def read_edits(folder: Path, beside: str) -> list[EditRequest]:
    """The edits that `write_edits` wrote.

    Args:
        beside: the file that must lie beside them.

    Raises:
        ValueError: where one of the two is missing; it names it.
    """
    for name in (beside, EDITS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} holds no {name}; give a folder that an edited model was saved to")
    return [EditRequest(**r) for r in json.loads((folder / EDITS).read_text(encoding="utf-8"))]


def kept_without(requests: Sequence[EditRequest], removed: Sequence[EditRequest]) -> list[int]:
    """The places of the edits that stay when some are taken out.

    Raises:
        ValueError: for an edit that is not among them.
    """
    gone = {r.statement for r in removed}
    missing = gone - {r.statement for r in requests}
    if missing:
        raise ValueError(f"not among the edits, so it cannot be removed: {sorted(missing)[0]!r}")
    return [i for i, r in enumerate(requests) if r.statement not in gone]
