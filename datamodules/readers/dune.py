"""DUNE: edits in free text (news, scientific reasons, guidelines against stereotypes, sums) and questions on them.

Source: Akyürek et al. 2023, DUnE: Dataset for Unified Editing. How its answers are judged: `modules.protocols.dune`.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_keyed, read_all
from datamodules.readers.errors import SkippedRecords
from datamodules.readers.fields import distinct, stem
from datamodules.records import EditRecord, EditRequest, Query

SETS = ("new_info", "scientific", "debiasing_I", "debiasing_II", "arithmetic")
LETTERED = ("new_info", "scientific")  # questions with choices, of which a letter names the right one
_LOCALITY = "_locality"
_LINE = re.compile(r"^[ \t]*\(?([A-Ea-e])[.)]\s*(.+)$", re.MULTILINE)  # a number is the question's own


def read_dune(
    path: str | Path, on_error: OnError = "raise", subset: str | None = None, locality: bool | None = None
) -> Iterator[EditRecord]:
    """Read one set of DUNE.

    Shape: an object of parallel lists, `edits` (debiasing_I spells it `edits:`) and `test_inputs`; other keys are not
    read. A test input is [question, answer], a list of such pairs, or, in arithmetic, a question alone, whose answer
    stands behind the equals sign of its edit. Rows that share an edit's text are one record, `<set>-<index>` in the
    order of first appearance. The edit is free text.

    Two published test inputs are spoilt: one of debiasing_II is of three texts, one of scientific has the choices A, B,
    D, D and the answer C. Such are left out, and told by a warning (`SkippedRecords`) with their number.

    Questions are portability of the set's name as kind, and `domain` is that name. Where they have choices (new_info,
    scientific), the answers are the line of the right choice as InComeS scores it ("B. dry palms"; what runs over keeps
    its first line), and then the letter alone, which DUNE itself compares. Twelve questions of scientific have several
    choices in one line ("A. 500g. B. Less than 500g. ..."): a choice ends where the next letter's begins. In
    debiasing_I and debiasing_II the answer is the *stereotyped* one: the more often it is given, the less the edit has
    done.

    Locality questions belong to a set and to no edit of it. They are dealt out to the records in turn, as kind of the
    set's name, so that all records together ask each of them once.

    Args:
        subset: which set it is, one of `SETS`; by default the file's name says so.
        locality: whether to read `<name>_locality.json` (or .json.gz) beside the file; by default, where it is there.

    Raises:
        FileNotFoundError: if there is no such file; under `locality=True` also if the other one is not there.
        ValueError: see `load_keyed`; for a set that the name does not tell, and for lists that are not parallel.
        MalformedRecord: for an edit that is empty or not text, or a test input of another shape.
    """
    subset = subset or stem(path)
    if subset not in SETS:
        raise ValueError(f"{path}: its name tells no set of DUNE; give subset: one of {', '.join(SETS)}")
    rows = _rows(path)
    spoilt: list[str] = []
    others = [] if locality is False else list(_locality(Path(path), subset, bool(locality), spoilt))
    shares = [others[i :: len(rows)] for i in range(len(rows))]

    def convert(row: Mapping[str, Any], index: int) -> EditRecord:
        edit = row["edits"]
        if not isinstance(edit, str) or not edit.strip():
            raise ValueError(f"field 'edits' is {edit!r}; files of locality hold no edits, they are read beside theirs")
        return EditRecord(
            id=f"{subset}-{index}",
            requests=(EditRequest(text=edit.strip()),),
            locality={subset: tuple(shares[index])} if shares[index] else {},
            portability={subset: _queries(row, subset, spoilt)},
            domain=subset,
        )

    return _telling(read_all(rows, path, convert, on_error), path, spoilt)


def _telling(records: Iterator[EditRecord], path: str | Path, spoilt: list[str]) -> Iterator[EditRecord]:
    try:
        yield from records
    finally:  # also where no more are wanted
        if spoilt:
            told = f"{path}: {len(spoilt)} of its questions left out as spoilt, the first: {spoilt[0]}"
            warnings.warn(told, SkippedRecords, stacklevel=2)


def _rows(path: str | Path) -> list[dict[str, Any]]:
    """One row an edit: its text, and the (index, test input) of every published row that has it."""
    members = dict(load_keyed(path))
    edits = members.get("edits", members.get("edits:"))
    inputs = members.get("test_inputs")
    if not isinstance(edits, list) or not isinstance(inputs, list) or len(edits) != len(inputs):
        found = {key: len(value) for key, value in members.items() if isinstance(value, list)}
        raise ValueError(f"{path}: fields 'edits' and 'test_inputs' must be lists of one length, found {found}")
    rows: dict[Any, dict[str, Any]] = {}
    for i, (edit, asked) in enumerate(zip(edits, inputs, strict=True)):
        key = edit if isinstance(edit, str) else i
        rows.setdefault(key, {"edits": edit, "test_inputs": []})["test_inputs"].append((i, asked))
    return list(rows.values())


def _locality(path: Path, subset: str, required: bool, spoilt: list[str]) -> Iterable[Query]:
    name = path.name.removesuffix(".gz").removesuffix(".json") + _LOCALITY + ".json"
    file = next((f for f in (path.with_name(name), path.with_name(name + ".gz")) if f.is_file()), None)
    if file is None:
        if required:
            raise FileNotFoundError(
                f"no file {path.with_name(name)} (or .gz) of locality questions; or locality: false"
            )
        return
    for row in _rows(file):
        try:
            yield from _queries(row, subset, spoilt)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{file}: {error}; correct it, or read without it (locality: false)") from error


def _queries(row: Mapping[str, Any], subset: str, spoilt: list[str]) -> tuple[Query, ...]:
    """The questions of a row; of those left out, `spoilt` gets the reasons."""
    queries = []
    for i, asked in row["test_inputs"]:
        several = isinstance(asked, list) and all(isinstance(pair, list) for pair in asked)
        for pair in asked if several else [asked]:
            texts = [pair, _result(row["edits"], i)] if isinstance(pair, str) else pair
            if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or len(texts) < 2:
                raise TypeError(
                    f"field 'test_inputs[{i}]' must be [question, answer], such pairs, or a question: {pair!r}"
                )
            question, answer = texts[0].strip(), texts[1].strip()
            offered = choices(question) if subset in LETTERED else {}
            line = offered.get(answer.upper())
            if len(texts) > 2:
                spoilt.append(f"'test_inputs[{i}]' is of {len(texts)} texts")
            elif offered and answer and not line:
                spoilt.append(f"'test_inputs[{i}]' has the answer {answer!r} and the choices {', '.join(offered)}")
            else:
                queries.append(Query(question, distinct([line, answer] if line else [answer])))
    return tuple(queries)


def choices(question: str) -> dict[str, str]:
    """The choices of a question by letter (or number), each as its line: {"A": "A. dry palms", ...}.

    Each stands on a line of its own ("A. ...", "A) ...", "(A) ..."), or they follow one another, letter by letter, as
    "(A) ... (B) ..." or "A. ... B. ...". Of two lines with one letter the first is taken.
    """
    lines: dict[str, str] = {}
    for line in _LINE.finditer(question):
        lines.setdefault(line[1].upper(), line[0].strip())
    found = max(lines, *(_in_a_row(question, labels) for labels in ("ABCDE", "12345")), key=len)
    return found if len(found) > 1 else {}


def _in_a_row(question: str, labels: str) -> dict[str, str]:
    starts, at = [], 0
    for label in labels:
        mark = re.compile(rf"(?<![^\s,])(?:\({label}\)|{label}[.)](?=\s))").search(question, at)
        if not mark:
            break
        starts.append(mark.start())
        at = mark.end()
    spans = zip(labels, starts, [*starts[1:], None], strict=False)
    return {label: question[start:end].strip(" ,").splitlines()[0].strip() for label, start, end in spans}


def _result(edit: Any, index: int) -> str:
    """What a sum comes to: the text behind its equals sign."""
    _, equals, result = edit.rpartition("=") if isinstance(edit, str) else ("", "", "")
    if not equals or not result.strip():
        raise ValueError(
            f"field 'edits[{index}]' is {edit!r}: a question without an answer needs an edit 'sum = answer'"
        )
    return result.strip()
