"""What generated facts need to be written in UniEdit's shape: wordings of its questions, and the rows themselves."""

from dataclasses import dataclass
from typing import Any

from datamodules.readers.facts import CITY_COUNTRY, COUNTRY_RELATIONS, Relation

NEIGHBOUR = Relation(
    "country-neighbour",
    "A country that shares a border with {s} is",
    ("Among the neighbours of {s} is", "{s} has a common border with", "A traveller leaves {s} by land and enters"),
    ("On a map, the country next to {s} is", "One of the countries that border on {s} is"),
)
RELATIONS = {r.name: r for r in (CITY_COUNTRY, *COUNTRY_RELATIONS, NEIGHBOUR)}
OTHER_NEIGHBOUR = "Besides {o}, a country that shares a border with {s} is"
REVERSED = {
    "country-capital": "The country that has {o} as its capital is",
    "country-neighbour": "A country that {o} shares a border with is",
}
REVERSED_HOPS = {  # tail of a capital edit -> country -> attribute
    "country-currency": "The currency of the country whose capital is {o} is the",
    "country-continent": "The country whose capital is {o} is on the continent of",
}
SAME = {
    "city-country": "Is the country where {s} is located the same as the country where {x} is located?",
    "country-currency": "Is the currency of {s} the same as the currency of {x}?",
    "country-continent": "Is {s} on the same continent as {x}?",
}


@dataclass(frozen=True)
class Thing:
    """An entity: what UniEdit takes from Wikidata."""

    id: str
    label: str
    aliases: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        return {"id": self.id, "label": self.label, "description": "", "aliases": list(self.aliases)}


def fact_row(
    path: list[str], relation: Relation, head: Thing, tail: Thing, subject: str | None = None, target: str | None = None
) -> dict[str, Any]:
    name = subject or head.label
    return {
        "path": path,
        "prompt": relation.prompt.format(s=name),
        "subject": name,
        "target": target or tail.label,
        "reverse_in_multi_hop": False,
        "head_entity": head.row(),
        "property": {"id": relation.name, "label": relation.name, "single_value": relation is not NEIGHBOUR},
        "tail_entity": {"order_in_property": 0, "datatype": "wikibase-item", "value": tail.row()},
        "single_inverse": relation.name == "country-capital",
    }


def reversed_row(fact: dict[str, Any], prompt: str) -> dict[str, Any]:
    """The fact as a hop from its tail to its head."""
    turned = {"prompt": prompt.format(o=fact["target"]), "target": fact["head_entity"]["label"]}
    return fact | {"reverse_in_multi_hop": True, "reversed": turned}


def single_row(prompt: str, target: str, hops: list[dict[str, Any]]) -> dict[str, Any]:
    paths = []
    for hop in hops:
        ends, back = hop["path"], hop["reverse_in_multi_hop"]
        many = not (hop["single_inverse"] if back else hop["property"]["single_value"])
        paths.append([*(ends[::-1] if back else ends), "b" if back else "f", "m" if many else "s"])
    return {"path_type": "single", "prompt": prompt, "target": target, "paths": paths, "one_hops": hops}


def double_row(prompt: str, yes: bool, first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    answer = "Yes" if yes else "No"
    paths = {"single_path1": first, "single_path2": second}
    return {"path_type": "double", "prompt": prompt, "target": answer, **paths}


def local_row(sort: str, prompt: str, hops: list[dict[str, Any]]) -> dict[str, Any]:
    return {"loc_type": sort, **single_row(prompt, hops[-1]["target"], hops)}
