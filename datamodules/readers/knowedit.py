"""KnowEdit's fact sets: WikiData-counterfact, WikiData-recent and zsRE with portability.

Source: Zhang et al. 2024, KnowEdit; its WikiData questions come from RippleEdits (Cohen et al. 2023).
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.fields import distinct, items, record_id, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query


def read_knowedit(path: str | Path, on_error: OnError = "raise") -> Iterator[EditRecord]:
    """Read a KnowEdit file.

    Fields: `prompt`, `target_new` (one text, or a list whose rest are aliases); optional `subject`, `ground_truth` (the
    old target; recent facts have none), `rephrase` or `rephrase_prompt` (the train file has neither), `portability` and
    `locality`: {kind: [{`prompt`, `ground_truth`}]}. The kinds keep their published names: Reasoning,
    Logical_Generalization, Subject_Aliasing; Relation_Specificity, Forgetfulness.

    A ground truth is a text, a list of texts or a list of alias lists. All of its texts are answers, in order: the
    first one is scored, whether the others name the same thing or another right answer. The published files have
    questions without any answer (empty alias lists); those questions are left out, and so are questions with an empty
    prompt and kinds that are left without questions. Wherever else the shape is broken, the record is malformed.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for a record that is not of this shape.
    """
    return read_all(load_rows(path), path, lambda row, i: _record(row, record_id(row, path, i)), on_error)


def _record(row: Mapping[str, Any], name: str) -> EditRecord:
    prompt, target = text(row, "prompt"), text(row, "target_new")
    new = distinct(texts(row, "target_new"))
    rephrases = texts(row, "rephrase") or texts(row, "rephrase_prompt")
    return EditRecord(
        id=name,
        requests=(
            EditRequest(
                prompt, target, subject_in(prompt, row), old_target=next(iter(texts(row, "ground_truth")), None)
            ),
        ),
        rephrases=tuple(Query(rephrase, new) for rephrase in rephrases),
        locality=_by_kind(row, "locality"),
        portability=_by_kind(row, "portability"),
    )


def _by_kind(row: Mapping[str, Any], field: str) -> dict[str, tuple[Query, ...]]:
    kinds = row.get(field) or {}
    if not isinstance(kinds, Mapping):
        raise TypeError(f"field {field!r} must be an object of kinds, not {type(kinds).__name__}")
    found = {kind: _queries(items(kinds, kind), f"{field}.{kind}") for kind in kinds if kinds[kind] is not None}
    return {kind: queries for kind, queries in found.items() if queries}


def _queries(questions: list[Mapping[str, Any]], where: str) -> tuple[Query, ...]:
    for question in questions:
        for field in ("prompt", "ground_truth"):
            if field not in question:
                raise KeyError(f"{where}.{field}")
    asked = [(texts(question, "prompt"), distinct(texts(question, "ground_truth"))) for question in questions]
    return tuple(Query(prompts[0], answers) for prompts, answers in asked if prompts and answers)
