"""zsRE question answering, in the shape of MEND and of those who built on its files (ROME, MEMIT, EasyEdit).

Sources: Levy et al. 2017 (the questions); Mitchell et al. 2022, MEND (the edit records); Yao et al. 2023, EasyEdit
(portability, subject replacement, inverse relation).
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.fields import distinct, one_hop, record_id, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query

_NQ_MARK = "nq question: "
_WH = re.compile(r"\b(?P<wh>what|which|whose|whom|who|when|where|why|how)(?P<is>['’]s)?\b", re.IGNORECASE)
# "In which city ...", "Due to which disease ..."; a wh-word that early after "The" is part of a name.
_OPENING_WH = re.compile(r"(?!the\b)(?:\w+ ){0,2}?" + _WH.pattern, re.IGNORECASE)
_OPEN_END = re.compile(r"\b(is|are|was|were)$", re.IGNORECASE)


def read_zsre(
    path: str | Path, on_error: OnError = "raise", target: Literal["alt", "answer"] = "alt"
) -> Iterator[EditRecord]:
    """Read a zsRE file of the MEND shape.

    Fields: `src` (question), `alt` (counterfactual target), `rephrase`; optional `subject`, `answers` (true answers),
    `loc` and `loc_ans`, `portability`, `alter_subject_question`, `inverse question`, `case_id`. The edit's `text` is
    the question made a statement (see `declarative`).

    - locality kind `nq`: a Natural Questions query. MEND marks it by "nq question: ", which is removed; its missing
      question mark is not added.
    - portability kinds: `one_hop`; `subject_aliasing`, the question about the subject's other name, with the edit's
      target; `inverse`, the question from the target back, which the subject answers.

    Args:
        target: "alt" edits towards `alt` (MEND, EasyEdit). "answer" edits towards the true `answers[0]`, the rest being
            aliases (ROME, MEMIT); `one_hop` and `inverse` are left out, since they are built on `alt`. Files that have
            no `answers` are published with the true answer as `alt`.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`; ValueError for an unknown `target` or `on_error`.
        MalformedRecord: for a record without a required field, among them the published records with an empty `alt`.
    """
    if target not in ("alt", "answer"):
        raise ValueError(f"target must be 'alt' or 'answer', got {target!r}")
    return read_all(load_rows(path), path, lambda row, i: _record(row, record_id(row, path, i), target), on_error)


def _record(row: Mapping[str, Any], name: str, target: str) -> EditRecord:
    prompt, true = text(row, "src"), distinct(texts(row, "answers"))
    if target == "answer" and not true:
        raise ValueError("field 'answers' is missing or empty, which target='answer' needs (or read with target='alt')")
    new = (text(row, "alt"),) if target == "alt" else true
    request = EditRequest(
        prompt=prompt,
        target=new[0],
        subject=subject_in(prompt, row),
        text=declarative(prompt, new[0]),
        old_target=true[0] if target == "alt" and true else None,
    )
    return EditRecord(
        id=name,
        requests=(request,),
        rephrases=(Query(text(row, "rephrase"), new),),
        locality=_locality(row),
        portability=_aliasing(row, new) | (one_hop(row) | _inverse(row) if target == "alt" else {}),
    )


def _locality(row: Mapping[str, Any]) -> dict[str, tuple[Query, ...]]:
    if "loc" not in row:
        return {}
    return {"nq": (Query(text(row, "loc").removeprefix(_NQ_MARK), (text(row, "loc_ans"),)),)}


def _aliasing(row: Mapping[str, Any], answers: tuple[str, ...]) -> dict[str, tuple[Query, ...]]:
    if "alter_subject_question" not in row:
        return {}
    return {"subject_aliasing": (Query(text(row, "alter_subject_question"), answers),)}


def _inverse(row: Mapping[str, Any]) -> dict[str, tuple[Query, ...]]:
    if "inverse question" not in row:
        return {}
    return {"inverse": (Query(text(row, "inverse question"), (text(row, "subject"),)),)}


def declarative(question: str, answer: str) -> str:
    """A question and its answer as one statement, after InComeS: the answer takes the place of the wh-word.

    "What is the capital of France?" becomes "Paris is the capital of France.", and "The capital of France is what?" or
    "The capital of France is?" become "The capital of France is Paris.". English comes out rough where the question has
    an auxiliary or a noun ("Cuba country does Guy Cuevas belong to."), but all of its other words are kept. A
    question that opens with an adverb (when, where, why, how) or that has no wh-word is followed by its answer instead.
    """
    body = question.strip().rstrip("?").rstrip()
    opening = _OPENING_WH.match(body)
    if opening:
        wh = None if opening["wh"].lower() in ("when", "where", "why", "how") else opening
    elif _OPEN_END.search(body):
        return _sentence(f"{body} {answer}")
    else:
        found = list(_WH.finditer(body))
        wh = found[-1] if found else None
    if wh is None:
        return _sentence(f"{question.strip()} {answer}")
    ending = "'s" if wh["wh"].lower() == "whose" else " is" if wh["is"] else ""
    return _sentence(body[: wh.start("wh")] + answer + ending + body[wh.end() :])


def _sentence(words: str) -> str:
    return words if words.endswith((".", "!", "?")) else words + "."
