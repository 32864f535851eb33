"""UniEdit: edits of 25 domains, each with a generality and a locality question drawn from the facts around it.

Source: Chen et al. 2025, arXiv 2505.12345; its README gives the shape, its loader the criteria. A question is a chain
of facts ("single": what stands at its end?) or two chains ("double": do both end in the same entity? Yes or no).
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from datamodules.readers.base import OnError, load_keyed, read_all
from datamodules.readers.fields import distinct, items, stem, subject_in, text, texts
from datamodules.records import EditRecord, EditRequest, Query

# rephrase, multi-hop, relation reversal, same-entity reasoning, subject alias, object alias
GENERALITY = ("Rep", "MH", "RR", "SER", "SA", "OA")
# subject, relation and object specificity, 1-N forgotten; and of generality's those that the question itself has
LOCALITY = ("SS", "RS", "OS", "1-NF", "MH", "SER")
YES_OR_NO = " The answer is (Yes/No):"
EDIT = ["h_e", "r_e", "t_e"]  # the path of the edited fact itself

_LOCALITY_KINDS = {
    "none": "unrelated",
    "head of edit": "subject",
    "property of edit": "relation",
    "tail of edit": "object",
}


def read_uniedit(
    path: str | Path, domains: Collection[str] | None = None, on_error: OnError = "raise"
) -> Iterator[EditRecord]:
    """Read UniEdit: a folder of domain files (`train/agronomy.json`, ...), in alphabetical order, or one of them.

    A file is {id: {`edit`, `generality`: {key: question}, `locality`: {key: question}}}. An edit has `prompt`,
    `target`, `subject`, `head_entity` {`id`, `label`, `aliases`}, `property` {`id`}, `tail_entity` {`datatype`,
    `value`: an entity too where the datatype is "wikibase-item"}. A question has `path_type`, `prompt`, `target` and
    the facts of its chain, `paths` and `one_hops`; with path_type "double" two of them, in `single_path1` and
    `single_path2`. A fact looks like an edit, and has its `path` and `reverse_in_multi_hop`. A locality question has a
    `loc_type`.

    A question that asks for the edited fact itself (Rep) is a rephrase. Every other one follows from the edit, and is
    portability of kind `same_entity` (double), `multi_hop`, or `relation_reversal`, the first that fits. Locality is of
    kind `unrelated`, `subject`, `relation` or `object`, for what it shares with the edit (`loc_type`). `criteria` are
    UniEdit's own, which overlap: `GENERALITY`, `LOCALITY`. `hops` are the chain's facts besides the edit; of a locality
    question all. The prompt of a double question gets UniEdit's suffix " The answer is (Yes/No):". The aliases of the
    entity at a chain's end are answers too. `domain` is the file's; ids are `<domain>-<id>`, as UniEdit's.

    Args:
        domains: read only these, by the names of their files.

    Raises:
        FileNotFoundError, ValueError: see `load_keyed`; ValueError also for a folder without domain files, or an
            unknown domain.
        MalformedRecord: for a record that is not of this shape.
    """
    rows = chain.from_iterable(_rows(file) for file in _files(Path(path), domains))
    return read_all(rows, path, lambda row, _: uniedit_record(row), on_error)


def _files(path: Path, domains: Collection[str] | None) -> list[Path]:
    if not path.is_dir():
        if domains:
            raise ValueError(f"domains choose among the files of a folder, but {path} is one file; leave them out")
        return [path]
    files = {stem(f): f for f in sorted(path.iterdir()) if f.name.endswith((".json", ".json.gz"))}
    if not files:
        raise ValueError(f"{path} holds no domain files (*.json); give UniEdit's folder `train` or `test`")
    unknown = sorted(set(domains or ()) - set(files))
    if unknown:
        raise ValueError(f"{path} has no domain {unknown[0]!r}; there are: {', '.join(files)}")
    return [f for name, f in files.items() if not domains or name in domains]


def _rows(file: Path) -> Iterator[Any]:
    domain = stem(file)
    for key, row in load_keyed(file):
        yield {"id": f"{domain}-{key}", "domain": domain, **row} if isinstance(row, Mapping) else row


def uniedit_record(row: Mapping[str, Any]) -> EditRecord:
    """One record; `row` is UniEdit's, with its `id` and `domain` added.

    Raises:
        KeyError, TypeError, ValueError: naming the field.
    """
    edit = _object(row, "edit")
    rephrases: list[Query] = []
    portability: dict[str, list[Query]] = {}
    locality: dict[str, list[Query]] = {}
    for question in _questions(row, "generality"):
        query = _generality(question)
        if "Rep" in query.criteria:
            rephrases.append(query)
        else:
            names = {"SER": "same_entity", "MH": "multi_hop", "RR": "relation_reversal"}
            kind = next(kind for criterion, kind in names.items() if criterion in query.criteria)
            portability.setdefault(kind, []).append(query)
    for question in _questions(row, "locality"):
        if text(question, "loc_type") not in _LOCALITY_KINDS:
            known = ", ".join(_LOCALITY_KINDS)
            raise ValueError(f"field 'locality.loc_type' is {question['loc_type']!r}, none of {known}")
        locality.setdefault(_LOCALITY_KINDS[text(question, "loc_type")], []).append(_locality(question, edit))
    return EditRecord(
        id=text(row, "id"),
        requests=(_request(edit),),
        rephrases=tuple(rephrases),
        locality={kind: tuple(queries) for kind, queries in locality.items()},
        portability={kind: tuple(queries) for kind, queries in portability.items()},
        domain=text(row, "domain"),
    )


def _generality(question: Mapping[str, Any]) -> Query:
    paths, hops = _chains(question)
    edited = [hop for hop in hops if hop["path"] == EDIT]
    if not edited:
        raise ValueError("field 'generality.one_hops' has no hop with the path of the edit, h_e r_e t_e")
    head, tail = _object(edited[0], "head_entity"), _tail_entity(edited[0])
    has = {
        "Rep": _single(question) and [path[:4] for path in paths] == [[*EDIT, "f"]],
        "MH": _multi_hop(question),
        "RR": ["t_e", "r_e", "h_e", "b"] in [path[:4] for path in paths],
        "SER": not _single(question),
        "SA": bool(texts(head, "aliases")) and texts(edited[0], "subject")[:1] != (text(head, "label"),),
        "OA": bool(tail and texts(tail, "aliases") and text(edited[0], "target") != text(tail, "label")),
    }
    if not any(has[name] for name in ("Rep", "MH", "RR", "SER")):
        raise ValueError(f"field 'generality.paths' asks neither for the edit nor for what follows from it: {paths}")
    return _query(question, [hop for hop in hops if hop["path"] != EDIT], has)


def _locality(question: Mapping[str, Any], edit: Mapping[str, Any]) -> Query:
    _, hops = _chains(question)
    head, relation = text(edit, "head_entity.id"), text(edit, "property.id")
    tail = _tail_entity(edit)
    heads = [(text(hop, "head_entity.id"), text(hop, "property.id")) for hop in hops]
    ends = {h for h, _ in heads} | {text(end, "id") for end in map(_tail_entity, hops) if end}
    has = {
        "SS": head in ends,
        "RS": relation in [r for _, r in heads],
        "OS": tail is not None and text(tail, "id") in ends,
        "1-NF": (head, relation) in heads,
        "MH": _multi_hop(question),
        "SER": not _single(question),
    }
    return _query(question, hops, has)


def _query(question: Mapping[str, Any], hops: Sequence[Mapping[str, Any]], has: Mapping[str, bool]) -> Query:
    answers = [text(question, "target")]
    if _single(question):
        last = items(question, "one_hops")[-1]
        end = _object(last, "head_entity") if last.get("reverse_in_multi_hop") else _tail_entity(last)
        answers += [text(end, "label"), *texts(end, "aliases")] if end else []
    return Query(
        text(question, "prompt") + ("" if _single(question) else YES_OR_NO),
        distinct(answers),
        tuple(dict.fromkeys(map(_request, hops))),
        tuple(name for name, holds in has.items() if holds),
    )


def _request(fact: Mapping[str, Any]) -> EditRequest:
    prompt, tail = text(fact, "prompt"), _tail_entity(fact)
    value = _object(fact, "tail_entity").get("value")
    end = text(tail, "id") if tail else f"{text(fact, 'property.id')}: {value}"
    ends = (text(fact, "head_entity.id"), end)
    return EditRequest(prompt, text(fact, "target"), subject_in(prompt, fact), fact=ends)


def _chains(question: Mapping[str, Any]) -> tuple[list[list[str]], list[Mapping[str, Any]]]:
    """Paths and facts of a question's one chain, or of its two."""
    parts = [question] if _single(question) else [_object(question, f"single_path{i}") for i in (1, 2)]
    hops = [hop for part in parts for hop in items(part, "one_hops")]
    if not all(items(part, "one_hops") for part in parts):
        raise ValueError("field 'one_hops' is empty")
    for hop in hops:
        if not isinstance(hop.get("path"), list):
            raise TypeError("field 'one_hops.path' must be a list")
    return [path for part in parts for path in _paths(part)], hops


def _multi_hop(question: Mapping[str, Any]) -> bool:
    parts = [question] if _single(question) else [_object(question, f"single_path{i}") for i in (1, 2)]
    return any(len(_paths(part)) > 1 for part in parts)


def _paths(part: Mapping[str, Any]) -> list[list[str]]:
    paths = part["paths"]
    if not isinstance(paths, list) or not all(isinstance(p, list) and len(p) == 5 for p in paths):
        raise TypeError("field 'paths' must be a list of paths, each of head, relation, tail, direction and count")
    return paths


def _single(question: Mapping[str, Any]) -> bool:
    kind = text(question, "path_type")
    if kind not in ("single", "double"):
        raise ValueError(f"field 'path_type' is {kind!r}, neither single nor double")
    return kind == "single"


def _tail_entity(fact: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entity at the fact's end, or None where that is a number, a date or another value."""
    tail = _object(fact, "tail_entity")
    return _object(tail, "value") if text(tail, "datatype") == "wikibase-item" else None


def _questions(row: Mapping[str, Any], field: str) -> list[Mapping[str, Any]]:
    return [_object(_object(row, field), key) for key in _object(row, field)]


def _object(row: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = row[field]
    if not isinstance(value, Mapping):
        raise TypeError(f"field {field!r} must be an object, not {type(value).__name__}")
    return value
