"""UniEdit's shape on hand-made records, each built fact by fact as its README describes them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from datamodules.readers import read
from datamodules.readers.errors import MalformedRecord
from datamodules.readers.uniedit import uniedit_record
from datamodules.records import EditRecord, EditRequest, Query
from datamodules.sources import Source, load


def entity(qid: str, label: str, *aliases: str) -> dict[str, Any]:
    return {"id": qid, "label": label, "description": "", "aliases": list(aliases)}


LYON, JAPAN, TOKYO = entity("Q1", "Lyon", "Lugdunum"), entity("Q2", "Japan", "Nippon"), entity("Q3", "Tokyo", "Edo")
OSAKA, ROME, ITALY = entity("Q4", "Osaka"), entity("Q5", "Rome"), entity("Q6", "Italy")


def fact(path: str, prop: str, head: dict[str, Any], tail: dict[str, Any], prompt: str, **more: Any) -> dict[str, Any]:
    is_entity = "id" in tail
    datatype = "wikibase-item" if is_entity else "quantity"
    return {
        "path": path.split(),
        "prompt": prompt,
        "subject": head["label"],
        "target": tail["label"] if is_entity else str(tail["amount"]),
        "reverse_in_multi_hop": False,
        "head_entity": head,
        "property": {"id": prop, "label": prop, "single_value": True},
        "tail_entity": {"order_in_property": 0, "datatype": datatype, "value": tail},
        "single_inverse": False,
    } | more


def single(prompt: str, target: str, paths: list[str], hops: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    kind = {"path_type": "single", "prompt": prompt, "target": target}
    return kind | {"paths": [p.split() for p in paths], "one_hops": hops} | more


EDIT = fact("h_e r_e t_e", "P17", LYON, JAPAN, "Lyon lies in the country of")
CAPITAL = fact("t_e r_0 e_0", "P36", JAPAN, TOKYO, "The capital of Japan is")
HOME = fact("e_0 r_0 t_e", "P17", OSAKA, JAPAN, "Osaka lies in the country of")
F, B = "h_e r_e t_e f s", "t_e r_e h_e b m"


def record(general: Any = None, local: Any = None, edit: dict[str, Any] | None = None) -> EditRecord:
    general = general or single("Lyon is in", "Japan", [F], [EDIT])
    local = local or single("Rome is in", "Italy", ["e_0 r_0 e_1 f s"], [ELSEWHERE], loc_type="none")
    row = {"edit": edit or EDIT, "generality": {"0": general}, "locality": {"0": local}}
    return uniedit_record({"id": "geography-7", "domain": "geography", **row})


ELSEWHERE = fact("e_0 r_0 e_1", "P17", ROME, ITALY, "Rome lies in the country of")


def test_an_edit_and_a_rephrase() -> None:
    made = record()
    assert made.id == "geography-7"
    assert made.domain == "geography"
    assert made.requests == (EditRequest("Lyon lies in the country of", "Japan", "Lyon", fact=("Q1", "Q2")),)
    assert made.rephrases == (Query("Lyon is in", ("Japan", "Nippon"), (), ("Rep",)),)
    assert made.portability == {}


@pytest.mark.parametrize(
    ("hop", "criteria"),
    [
        (EDIT | {"subject": "Lugdunum"}, ("Rep", "SA")),
        (EDIT | {"target": "Nippon"}, ("Rep", "OA")),
        (EDIT | {"subject": "", "target": "Nippon"}, ("Rep", "SA", "OA")),
        (EDIT | {"head_entity": entity("Q1", "Lyons")}, ("Rep",)),  # without aliases it is no alias
    ],
)
def test_aliases(hop: dict[str, Any], criteria: tuple[str, ...]) -> None:
    (query,) = record(single("Lugdunum is in", "Nippon", [F], [hop])).rephrases
    assert query.criteria == criteria
    assert query.answers == ("Nippon", "Japan")


def test_a_chain_of_two_facts_names_the_other_one() -> None:
    made = record(single("The capital of Lyon's country is", "Tokyo", [F, "t_e r_0 e_0 f s"], [EDIT, CAPITAL]))
    (query,) = made.portability["multi_hop"]
    assert made.rephrases == ()
    assert query.criteria == ("MH",)
    assert query.answers == ("Tokyo", "Edo")
    assert query.hops == (EditRequest("The capital of Japan is", "Tokyo", "Japan", fact=("Q2", "Q3")),)


def test_relation_reversal_ends_at_the_head() -> None:
    back = EDIT | {"reverse_in_multi_hop": True, "reversed": {"prompt": "A city in Japan is", "target": "Lyon"}}
    (query,) = record(single("A city in Japan is", "Lyon", [B], [back])).portability["relation_reversal"]
    assert (query.criteria, query.answers, query.hops) == (("RR",), ("Lyon", "Lugdunum"), ())
    both = record(single("The capital of ... is", "Tokyo", [B, "t_e r_0 e_0 f s"], [back, CAPITAL]))
    assert both.portability["multi_hop"][0].criteria == ("MH", "RR")


def double(target: str = "Yes", **more: Any) -> dict[str, Any]:
    one = single("Lyon is in", "Japan", [F], [EDIT])
    two = single("Osaka is in", "Japan", ["e_0 r_0 t_e f s"], [HOME])
    asked = {"path_type": "double", "prompt": "Are Lyon and Osaka in one country?", "target": target}
    return asked | {"paths": [], "single_path1": one, "single_path2": two} | more


def test_two_chains_are_a_yes_no_question() -> None:
    (query,) = record(double()).portability["same_entity"]
    assert query.prompt == "Are Lyon and Osaka in one country? The answer is (Yes/No):"
    assert (query.answers, query.criteria) == (("Yes",), ("SER",))
    assert query.hops == (EditRequest("Osaka lies in the country of", "Japan", "Osaka", fact=("Q4", "Q2")),)


LOCAL = [
    ("none", [ELSEWHERE], "unrelated", ("RS",)),
    ("none", [CAPITAL | {"head_entity": ITALY, "tail_entity": ELSEWHERE["tail_entity"]}], "unrelated", ()),
    ("tail of edit", [CAPITAL], "object", ("OS",)),
    ("tail of edit", [HOME], "object", ("RS", "OS")),
    ("head of edit", [fact("h_e r_0 e_0", "P6", LYON, ROME, "The twin of Lyon is")], "subject", ("SS",)),
    ("property of edit", [fact("e_0 r_1 h_e", "P6", ROME, LYON, "The twin of Rome is")], "relation", ("SS",)),
    ("head of edit", [fact("h_e r_e e_0", "P17", LYON, ITALY, "Lyon also lies in")], "subject", ("SS", "RS", "1-NF")),
]


@pytest.mark.parametrize(("sort", "hops", "kind", "criteria"), LOCAL)
def test_locality(sort: str, hops: list[dict[str, Any]], kind: str, criteria: tuple[str, ...]) -> None:
    local = record(local=single("p", "t", ["e_0 r_0 e_1 f s"] * len(hops), hops, loc_type=sort)).locality
    assert list(local) == [kind]
    assert local[kind][0].criteria == criteria
    assert [hop.prompt for hop in local[kind][0].hops] == [hop["prompt"] for hop in hops]


def test_locality_of_two_facts_and_of_two_chains() -> None:
    chain = single("p", "t", ["e_0 r_0 e_1 f s", "e_1 r_1 e_2 f s"], [ELSEWHERE, CAPITAL], loc_type="none")
    assert record(local=chain).locality["unrelated"][0].criteria == ("RS", "OS", "MH")
    (query,) = record(local=double("No", loc_type="none")).locality["unrelated"]
    assert query.prompt.endswith("(Yes/No):")
    assert query.criteria == ("SS", "RS", "OS", "1-NF", "SER")
    assert {hop.fact for hop in query.hops} == {("Q1", "Q2"), ("Q4", "Q2")}  # the edit's own: left out in evaluation


def test_a_tail_that_is_a_number() -> None:
    people = fact("h_e r_e t_e", "P1082", LYON, {"amount": "+520000", "unit": "1"}, "The population of Lyon is")
    made = record(single("So many live in Lyon:", "520000", [F], [people]), edit=people)
    assert made.request.fact == ("Q1", "P1082: {'amount': '+520000', 'unit': '1'}")
    assert made.rephrases[0] == Query("So many live in Lyon:", ("520000",), (), ("Rep",))
    assert "OS" not in made.locality["unrelated"][0].criteria


def write(folder: Path, domain: str, count: int, suffix: str = ".json") -> None:
    row = {
        "edit": EDIT,
        "generality": {"0": single("Lyon is in", "Japan", [F], [EDIT])},
        "locality": {"0": single("Rome is in", "Italy", ["e_0 r_0 e_1 f s"], [ELSEWHERE], loc_type="none")},
    }
    text = json.dumps({str(i): row for i in range(count)}, indent=1).encode()
    (folder / f"{domain}{suffix}").write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)


def test_a_folder_of_domains_or_one_of_them(tmp_path: Path) -> None:
    write(tmp_path, "biology", 2, ".json.gz")
    write(tmp_path, "art", 1)
    (tmp_path / "readme.md").write_text("no data")
    assert [r.id for r in read("uniedit", tmp_path)] == ["art-0", "biology-0", "biology-1"]
    assert [r.domain for r in read("uniedit", tmp_path, domains=["biology"])] == ["biology"] * 2
    assert [r.id for r in read("uniedit", tmp_path / "art.json")] == ["art-0"]
    with pytest.raises(ValueError, match=r"no domain 'arts'; there are: art, biology"):
        read("uniedit", tmp_path, domains=["arts"])
    with pytest.raises(ValueError, match=r"art\.json is one file"):
        read("uniedit", tmp_path / "art.json", domains=["art"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no domain files .*`train` or `test`"):
        read("uniedit", tmp_path / "empty")


def test_a_folder_is_a_source_and_read_anew_when_a_file_in_it_changes(tmp_path: Path) -> None:
    data = tmp_path / "test"
    data.mkdir()
    write(data, "art", 2)
    source, cache = Source("uniedit", str(data)), str(tmp_path / "cache")
    first = load([source], cache)
    assert first.record(1).rephrases[0].criteria == ("Rep",)
    assert first.record(1).request.fact == ("Q1", "Q2")
    write(data, "art", 3)
    assert len(load([source], cache)) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"edit": None}, "field 'edit' must be an object, not NoneType"),
        ({"generality": {"0": double() | {"path_type": "triple"}}}, "'path_type' is 'triple'"),
        ({"generality": {"0": single("p", "t", [F], [CAPITAL])}}, "no hop with the path of the edit"),
        ({"generality": {"0": single("p", "t", ["h_e r_e"], [EDIT])}}, "'paths' must be a list of paths"),
        ({"generality": {"0": single("p", "t", ["t_e r_0 e_0 f s"], [EDIT])}}, "asks neither for the edit"),
        ({"generality": {"0": single("p", "t", [F], [])}}, "'one_hops' is empty"),
        ({"locality": {"0": single("p", "t", [F], [ELSEWHERE])}}, "field 'loc_type' is missing"),
        ({"locality": {"0": single("p", "t", [F], [ELSEWHERE], loc_type="tail")}}, "loc_type' is 'tail'"),
        ({"edit": {k: v for k, v in EDIT.items() if k != "property"}}, "field 'property.id' is missing"),
    ],
)
def test_malformed_records_are_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    write(tmp_path, "art", 2)
    rows = json.loads((tmp_path / "art.json").read_text())
    rows["1"] |= change
    (tmp_path / "art.json").write_text(json.dumps(rows))
    with pytest.raises(MalformedRecord, match=rf"record 1 \(id art-1\): .*{reason}"):
        list(read("uniedit", tmp_path))


@pytest.mark.parametrize(
    ("content", "reason"), [("[]", "must be one JSON object"), ("{}", "holds no records"), ("", "holds no records")]
)
def test_files_that_are_no_object_of_records(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "art.json").write_text(content)
    with pytest.raises(ValueError, match=reason):
        list(read("uniedit", tmp_path))
    (tmp_path / "art.json").write_text('{"0": {\n"edit": }')
    with pytest.raises(ValueError, match=r"art\.json, line 2: broken JSON .*one JSON object"):
        list(read("uniedit", tmp_path))
