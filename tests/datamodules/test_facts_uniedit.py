"""Generated facts in UniEdit's shape: every criterion, answers that are true, no question against another edit."""

from collections import Counter
from functools import cache

import pytest

from datamodules.readers import read
from datamodules.readers.facts import SHARES, cities, countries, is_bystander, read_facts, split_of
from datamodules.readers.uniedit import GENERALITY, LOCALITY
from datamodules.readers.uniedit_rows import RELATIONS
from datamodules.records import EditRecord, Query


@cache
def split(name: str, seed: int = 0) -> list[EditRecord]:
    return list(read("facts_uniedit", split=name, seed=seed, cities_per_country=8))


def generality(record: EditRecord) -> list[Query]:
    return [*record.rephrases, *(q for queries in record.portability.values() for q in queries)]


def locality(record: EditRecord) -> list[Query]:
    return [q for queries in record.locality.values() for q in queries]


@cache
def truth() -> dict[str, set[str]]:
    """Prompt -> true answers, for every city and country."""
    known: dict[str, set[str]] = {}
    for town, code in cities(8).items():
        known[RELATIONS["city-country"].prompt.format(s=town)] = {countries()[code].name}
    for land in countries().values():
        for name, value in land.values.items():
            known[RELATIONS[name].prompt.format(s=land.name)] = {value}
    return known


def test_every_criterion_has_questions() -> None:
    asked = Counter(c for r in split("train") for q in generality(r) for c in q.criteria)
    left = Counter(c for r in split("train") for q in locality(r) for c in q.criteria)
    assert min(asked[name] for name in GENERALITY) > 3
    assert min(left[name] for name in set(LOCALITY) - {"SER"}) > 10
    answers = Counter(q.target for r in split("train") for q in generality(r) if "SER" in q.criteria)
    assert set(answers) == {"Yes", "No"}
    assert 0.35 < answers["Yes"] / answers.total() < 0.65


@pytest.mark.parametrize("name", SHARES)
def test_hops_and_simple_locality_are_true_and_no_edit_of_the_split_says_otherwise(name: str) -> None:
    edits = {r.request.prompt: r.request.target for r in split(name)}
    assert len(edits) == len(split(name)) > 40
    for record in split(name):
        request = record.request
        assert request.target not in truth().get(request.prompt, ())
        for hop in (h for q in (*generality(record), *locality(record)) for h in q.hops):
            assert hop.prompt not in edits, f"{hop.prompt!r} of {record.id}"
            assert hop.prompt not in truth() or hop.target in truth()[hop.prompt]
        for query in locality(record):
            assert query.prompt not in truth() or query.target in truth()[query.prompt]
            assert not any(hop.fact == request.fact for hop in query.hops)


def test_yes_no_answers_follow_from_the_edit_and_the_hop() -> None:
    for record in split("train"):
        for query in record.portability.get("same_entity", ()):
            (hop,) = query.hops
            assert query.target == ("Yes" if hop.target == record.request.target else "No")
            assert query.prompt.endswith("? The answer is (Yes/No):")


def test_subjects_stay_in_their_split_and_records_come_back() -> None:
    for name in SHARES:
        for record in split(name):
            subject = record.request.subject
            assert subject is not None
            assert split_of(subject) == name
            assert not is_bystander(subject)
            assert EditRecord.from_json(record.to_json()) == record
            assert all(split_of(h.subject) == name for q in generality(record) for h in q.hops if h.subject)


def test_the_seed_alone_decides() -> None:
    assert split("val") == list(read("facts_uniedit", split="val", seed=0, cities_per_country=8))
    assert split("val") != split("val", seed=1)
    with pytest.raises(ValueError, match=r"no split 'dev'; choose one of train, val, test"):
        next(read("facts_uniedit", split="dev"))


def test_plain_facts_are_written_as_before() -> None:
    line = next(iter(read_facts("test"))).to_json()
    assert not any(f'"{field}"' in line for field in ("hops", "criteria", "fact"))
