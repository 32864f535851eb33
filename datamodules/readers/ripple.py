"""RippleEdits: facts with what else changes, and what does not, when they are edited, each under its conditions.

Source: Cohen et al. 2023, arXiv 2307.12976.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_rows, read_all
from datamodules.readers.fields import distinct, items, record_id, text, texts
from datamodules.records import EditRecord, EditRequest, Query

PORTABILITY = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
LOCALITY = ("Relation_Specificity", "Forgetfulness")

# How a relation is put into words, where that is not "The name of the <relation> of {} is"; {} is the subject.
_WORDING = {
    "SEX_OR_GENDER": "The gender of {} is",
    "NUMBER_OF_CHILDREN": "The number of children {} has is",
    "COUNTRY": "The name of the country which {} is associated with is",
    "ETHNIC_GROUP": "The name of the ethnic group which {} is associated with is",
    "RELIGION": "The name of the religion which {} is associated with is",
    "CONTINENT": "The name of the continent which {} is part of is",
    "MEMBER_OF_SPORTS_TEAM": "The name of the sports team which {} is a member of is",
    "LEAGUE": "The name of the league which {} plays in is",
    "CAPITAL_OF": "The name of the country which {} is the capital of is",
    "POSITION_HELD": "The name of the position held by {} is",
    "AWARD_RECEIVED": "The name of the award {} won is",
    "CAPITAL": "The name of the capital city of {} is",
    "CURRENCY": "The name of the currency in {} is",
    "NATIVE_LANGUAGE": "The mother tongue of {} is",
    "SIBLING": "The names of the siblings of {} are",
    "CAST_MEMBER": "The names of the cast members of {} are",
    "FOLLOWS": "{} follows",
    "FOLLOWED_BY": "{} is followed by",
}
_UNNAMED = {  # "The <relation> of {} is"
    "PLACE_OF_BIRTH",
    "PLACE_OF_DEATH",
    "PLACE_OF_BURIAL",
    "DATE_OF_BIRTH",
    "DATE_OF_DEATH",
    "SEXUAL_ORIENTATION",
    "OCCUPATION",
    "EYE_COLOR",
    "OFFICIAL_LANGUAGE",
}


def read_ripple(path: str | Path, on_error: OnError = "raise") -> Iterator[EditRecord]:
    """Read RippleEdits (popular, random, recent), or a file that was filtered by what some model knows.

    Fields: `edit` {`prompt`, the whole new statement; `relation`; `previous_fact` or `original_fact` {`prompt`}, which
    recent facts do not have}, and six lists of tests, one a criterion: [{`test_queries`, `condition_queries`:
    [{`prompt`, `answers`: [{`value`, `aliases`}]}]}].

    The statement is parted into prompt, subject and target by the wording of its relation. Kinds are the criteria:
    Logical_Generalization, Compositionality_I, Compositionality_II and Subject_Aliasing are portability,
    Relation_Specificity and Forgetfulness locality. Every test query is a query. Its `conditions` are its test's
    condition queries: RippleEdits passes over a test of which the unedited model fails one (see
    `modules.protocols.conditions`). `domain` is the relation.

    Where several things are the answer, all of them and their aliases are answers, the first one's value first;
    RippleEdits itself asks that each be named. Queries and conditions that are published without an answer (its own
    code counts them as met) are left out, and so are kinds that are left without queries.

    Raises:
        FileNotFoundError, ValueError: see `load_rows`.
        MalformedRecord: for a record that is not of this shape, or a statement that is not worded as its relation.
    """
    return read_all(load_rows(path), path, lambda row, i: _record(row, record_id(row, path, i)), on_error)


def _record(row: Mapping[str, Any], name: str) -> EditRecord:
    relation = text(row, "edit.relation")
    prompt, subject, target = parted(text(row, "edit.prompt"), relation)
    old = next((f"edit.{field}.prompt" for field in ("previous_fact", "original_fact") if row["edit"].get(field)), None)
    request = EditRequest(prompt, target, subject, old_target=parted(text(row, old), relation)[2] if old else None)
    return EditRecord(
        id=name,
        requests=(request,),
        locality=_by_kind(row, LOCALITY),
        portability=_by_kind(row, PORTABILITY),
        domain=relation,
    )


def parted(statement: str, relation: str) -> tuple[str, str, str]:
    """Prompt, subject and target of a statement; it must be in the wording of its relation.

    Raises:
        ValueError: if it is not.
    """
    name = relation.lower().replace("_", " ")
    wording = _WORDING.get(
        relation, f"The {name} of {{}} is" if relation in _UNNAMED else f"The name of the {name} of {{}} is"
    )
    before, after = map(re.escape, wording.split("{}"))
    found = re.fullmatch(rf"({before}(.+?){after})\s+(.+?)\.?", statement, re.DOTALL)
    if found is None:
        raise ValueError(f"field 'edit.prompt' is {statement!r}, not {wording.format('<subject>')!r} and a target")
    return found[1], found[2], found[3]


def _by_kind(row: Mapping[str, Any], kinds: tuple[str, ...]) -> dict[str, tuple[Query, ...]]:
    found = {kind: tuple(q for test in items(row, kind) for q in _queries(test, kind)) for kind in kinds}
    return {kind: queries for kind, queries in found.items() if queries}


def _queries(test: Mapping[str, Any], kind: str) -> Iterator[Query]:
    conditions = tuple(_asked(test, "condition_queries", kind))
    for query in _asked(test, "test_queries", kind):
        yield Query(query.prompt, query.answers, conditions=conditions)


def _asked(test: Mapping[str, Any], field: str, kind: str) -> Iterator[Query]:
    if field not in test:
        raise KeyError(f"{kind}.{field}")
    for question in items(test, field):
        if "prompt" not in question or "answers" not in question:
            raise KeyError(f"{kind}.{field}.{'answers' if 'prompt' in question else 'prompt'}")
        given = [
            name
            for answer in items(question, "answers")
            for name in (*texts(answer, "value"), *texts(answer, "aliases"))
        ]
        if given:
            yield Query(text(question, "prompt"), distinct(given))
