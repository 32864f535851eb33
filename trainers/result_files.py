"""Result files read for comparison: an editor at a number of edits is an entry, and what must be alike in two of them.

The files are reports of trainers.evaluate (trainers/report.py) and cells of a benchmark (trainers/benchmark/run.py).
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.fluency import CONSISTENCY


@dataclass(frozen=True)
class Entry:
    """One editor at one number of edits.

    Args:
        told: what must be alike, by field; the protocol with what it was asked by. `queries_per_kind`,
            `demonstrations` and how a backbone was loaded are of results that say so, which older ones do not;
            `reference_texts` (how many) of those that have RS.
        results: per-record results by record id.
        code: a hash of the code that computed them, of results that say so.
    """

    file: str
    editor: str
    edits: int
    told: dict[str, Any]
    results: dict[str, Mapping[str, Any]] = field(repr=False)
    code: str | None = None


def read(path: Path, edits: Sequence[int] | None = None) -> list[Entry]:
    """The entries of a report or of a benchmark's cell, in its order; what failed is left out.

    Raises:
        FileNotFoundError, ValueError: where there is no such file, or it holds no per-record results.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no results {path}; give files that trainers.evaluate has written")
    try:
        found = list(_entries(str(path), json.loads(path.read_text(encoding="utf-8"))))
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no results of trainers.evaluate ({type(error).__name__}: {error})") from error
    kept = [entry for entry in found if not edits or entry.edits in edits]
    if not kept:
        there = sorted({entry.edits for entry in found})
        raise ValueError(f"{path}: edits: no results" + (f" of {list(edits)} edits, only of {there}" if edits else ""))
    return kept


def _entries(file: str, content: Mapping[str, Any]) -> Iterator[Entry]:
    if "points" in content:  # a cell
        for point in content["points"]:
            told = _told(content, content["protocol"], point["settings"])
            records = _by_id(point["records"])
            yield Entry(file, content["editor"], point["edits"], told, records, content.get("code"))
        return
    for editor, sizes in content["records"].items():
        for size, results in sizes.items():
            settings = content["runs"][editor][size]
            protocol = content["meta"].get("protocol") or settings.get("protocol", "default")
            told = _told(content["meta"], protocol, settings)
            yield Entry(file, editor, int(size), told, _by_id(results), settings.get("code"))


def _told(about: Mapping[str, Any], protocol: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    how = ("demonstrations", "demonstrations_by_relation", "chain_of_thought", "max_new_tokens", "max_tokens")
    options = {name: settings[name] for name in how if name in settings}
    batch = settings.get("batch") or about.get("batch") if about["mode"] == "consecutive" else None
    backbone = about["backbone"]
    told = {"protocol": protocol, "options": options, "mode": about["mode"], "batch": batch}
    told |= {"backbone": backbone["source"]}
    told |= {f"backbone.{name}": backbone[name] for name in ("dtype", "revision", "overrides") if name in backbone}
    if "queries_per_kind" in about:
        told["queries_per_kind"] = about["queries_per_kind"] or "all"
    if "demonstrations_hash" in settings:
        told["demonstrations"] = settings["demonstrations_hash"]
    if settings.get("reference_texts"):
        told["reference_texts"] = settings["reference_texts"]
    return told


def _by_id(results: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    found = {str(result["case_id"]): result for result in results}
    if len(found) < len(results):
        twice = next(name for name, count in Counter(str(r["case_id"]) for r in results).items() if count > 1)
        raise ValueError(
            f"records: the id {twice!r} stands for several records, which cannot be told apart: evaluate sources that "
            "share ids by themselves"
        )
    return found


_NEVER = {  # what no one may allow: why
    "protocol": "figures of two protocols cannot be compared",
    "queries_per_kind": "figures of other questions cannot be compared; evaluate both with the same --queries_per_kind",
    "reference_texts": "consistency (RS) with other texts cannot be compared; leave it out, by --metrics",
    "demonstrations": "answers after other demonstrations cannot be compared; these are hashes of the files' texts",
}


def differing(one: Entry, other: Entry, allow: Sequence[str], metrics: Sequence[str] | None = None) -> Iterator[str]:
    """What is allowed to differ and does, in words.

    Args:
        allow: fields, with their parts.
        metrics: those that are compared; None: all.

    Raises:
        ValueError: for what is not; it names the field and both values.
    """
    for name, value in one.told.items():
        theirs = other.told.get(name, value)
        if theirs == value or (name == "reference_texts" and metrics and CONSISTENCY not in metrics):
            continue
        field = "protocol" if name == "options" else name
        found = f"{field}: {one.file} ({one.editor}) has {value!r}, {other.file} ({other.editor}) has {theirs!r}"
        if name.partition(".")[0] in allow:
            yield found
        elif field in _NEVER:
            raise ValueError(f"{found}; {_NEVER[field]}")
        else:
            raise ValueError(f"{found}; give --allow {field.partition('.')[0]} to compare them all the same")
    if one.code and other.code and one.code != other.code:
        yield (
            f"code: {one.file} ({one.editor}) was computed by {one.code[:8]}, {other.file} ({other.editor}) by "
            f"{other.code[:8]}, which may differ in what they measure"
        )


def pairs(first: Sequence[Entry], others: Sequence[Entry], any_edits: bool) -> Iterator[tuple[Entry, list[Entry]]]:
    """The reference at each of its numbers of edits, with the others at the same; or at its first with all of them.

    Raises:
        ValueError: for a file that has none of the reference's numbers of edits.
    """
    if any_edits:
        yield first[0], [*first[1:], *others]
        return
    numbers = [entry.edits for entry in first]
    for file in dict.fromkeys(other.file for other in others):
        theirs = sorted({other.edits for other in others if other.file == file})
        if not set(theirs) & set(numbers):
            raise ValueError(
                f"edits: {first[0].file} ({first[0].editor}) has {numbers}, {file} has {theirs}; give --allow edits to "
                "compare them all the same"
            )
    for base in first:
        if of := [other for other in others if other.edits == base.edits]:
            yield base, of


def common(one: Entry, other: Entry) -> list[str]:
    """The ids of the records that both have.

    Raises:
        ValueError: where there are none, or one id stands for two edits.
    """
    ids = [name for name in one.results if name in other.results]
    if not ids:
        ours, theirs = next(iter(one.results), None), next(iter(other.results), None)
        raise ValueError(
            f"records: {one.file} ({one.editor}) and {other.file} ({other.editor}) have none in common; the first ones "
            f"are {ours!r} and {theirs!r}"
        )
    for name in ids:
        edits = [entry.results[name]["requested_rewrite"] for entry in (one, other)]
        if edits[0] != edits[1]:
            raise ValueError(f"records: {name!r} is {edits[0]} in {one.file} and {edits[1]} in {other.file}")
    return ids
