"""Generated facts: a score on the test split must not be a score on what was trained."""

import re
from functools import cache

import pytest

from datamodules.readers.facts import (
    CITY_COUNTRY,
    COUNTRY_RELATIONS,
    SHARES,
    cities,
    countries,
    read_facts,
    split_of,
)
from datamodules.records import EditRecord, Query


@cache
def split(name: str, seed: int = 0) -> list[EditRecord]:
    return list(read_facts(name, seed, cities_per_country=12))  # type: ignore[arg-type]


def queries(record: EditRecord) -> list[Query]:
    groups = [record.rephrases, *record.locality.values(), *record.portability.values()]
    return [q for group in groups for q in group]


@cache
def known() -> tuple[re.Pattern[str], set[str]]:
    """All subjects as one pattern, the longest first: Papua New Guinea before Guinea."""
    names = {c.name for c in countries().values()} | set(cities(12))
    longest = sorted(names, key=lambda n: -len(n))
    return re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest))})(?!\w)"), names


def named(text: str) -> set[str]:
    return set(known()[0].findall(text))


@pytest.mark.parametrize("name", SHARES)
def test_every_subject_that_is_asked_about_belongs_to_the_split(name: str) -> None:
    """The edit's, the neighbours' and the hops'."""
    assert len(split(name)) > 50
    for record in split(name):
        for prompt in (record.request.prompt, *(q.prompt for q in queries(record))):
            for subject in named(prompt):
                assert split_of(subject) == name, f"{prompt!r} of {record.id}"


def test_splits_share_no_subject_and_no_prompt() -> None:
    asked = {
        name: {p for r in split(name) for p in [r.request.prompt, *(q.prompt for q in queries(r))]} for name in SHARES
    }
    edited = {name: {r.request.subject for r in split(name)} for name in SHARES}
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not edited[a] & edited[b]
        assert not asked[a] & asked[b]


def test_held_out_wordings_are_unused_in_training() -> None:
    held_out = [w for relation in (CITY_COUNTRY, *COUNTRY_RELATIONS) for w in relation.held_out]
    patterns = [re.compile(re.escape(w).replace(r"\{s\}", ".+")) for w in held_out]
    for record in split("train"):
        for query in queries(record):
            assert not any(p.fullmatch(query.prompt) for p in patterns), query.prompt
    for name in ("val", "test"):
        for record in split(name):
            assert all(any(p.fullmatch(q.prompt) for p in patterns) for q in record.rephrases)


@pytest.mark.parametrize("name", SHARES)
def test_records_are_sound(name: str) -> None:
    records = split(name)
    assert len({r.id for r in records}) == len(records)
    for record in records:
        request = record.request
        assert request.subject in request.prompt
        assert request.target != request.old_target
        assert record.rephrases
        for query in record.rephrases:
            assert request.subject in query.prompt
            assert query.target == request.target
            # a country may be named in its own city's name, but the answer must not stand in the question
            assert request.target not in query.prompt.replace(request.subject, "")
        for query in (q for qs in record.locality.values() for q in qs):
            assert query.prompt != request.prompt


def test_the_same_seed_gives_the_same_records() -> None:
    again = list(read_facts("val", 0, cities_per_country=12))
    assert again == split("val")
    other = split("val", 1)
    assert other != again
    assert {r.id for r in other} == {r.id for r in again}  # other targets and order, the same subjects


def test_unknown_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*train, val, test"):
        list(read_facts("dev"))  # type: ignore[arg-type]


def test_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = {name: len({r.request.subject for r in split(name)}) for name in SHARES}
    total = sum(counts.values())
    for name, share in SHARES.items():
        assert counts[name] / total == pytest.approx(share, abs=0.05)
