import pytest

from datamodules.readers.counterfact import read_counterfact, read_snippets
from datamodules.readers.errors import MalformedRecord
from datamodules.records import EditRequest, Query

REWRITE = {
    "prompt": "{}, born in",
    "relation_id": "P19",
    "subject": "Mélanie {x}",
    "target_new": {"str": "Rome", "id": "Q220"},
    "target_true": {"str": "Lyon", "id": "Q456"},
}
ROME = {
    "case_id": 5,
    "requested_rewrite": REWRITE,
    "paraphrase_prompts": ["Mélanie {x} is from", "Mélanie {x} comes from"],
    "neighborhood_prompts": ["Ampère, born in", "Ampère, born in"],
    "attribute_prompts": ["Augustus, born in"],
    "generation_prompts": ["Mélanie {x} likes"],
}
EASYEDIT = {
    "case_id": 9,
    "prompt": "Mélanie was born in",
    "target_new": "Rome",
    "subject": "Mélanie",
    "ground_truth": "Lyon",
    "rephrase_prompt": "Mélanie is from",
    "locality_prompt": "Ampère was born in",
    "locality_ground_truth": "Lyon",
}


def test_rome_record(write):
    (record,) = read_counterfact(write([ROME]))
    assert record.id == "5"
    assert record.requests == (EditRequest("Mélanie {x}, born in", "Rome", "Mélanie {x}", None, "Lyon"),)
    assert record.rephrases == (Query("Mélanie {x} is from", ("Rome",)), Query("Mélanie {x} comes from", ("Rome",)))
    assert record.locality == {"neighborhood": (Query("Ampère, born in", ("Lyon",)),) * 2}
    assert record.portability == {}
    assert record.domain == "P19"
    assert record.generation == ("Mélanie {x} likes",)
    assert record.attribute == (Query("Augustus, born in", ("Rome",)),)
    assert record.target_id == "Q220"
    (bare,) = read_counterfact(write([{k: v for k, v in ROME.items() if not k.startswith(("gener", "attr"))}]))
    assert (bare.generation, bare.attribute) == ((), ())


def test_portability(write):
    extra = {"Recalled Relation": "(Rome, river, Tiber)", "New Question": "Which river?", "New Answer": "Tiber"}
    for row in (ROME, EASYEDIT):
        (record,) = read_counterfact(write([row | {"portability": extra}]))
        assert record.portability == {"one_hop": (Query("Which river?", ("Tiber",)),)}


def test_easyedit_record(write):
    (record,) = read_counterfact(write([EASYEDIT], "cf.jsonl"))
    assert record.id == "9"
    assert record.requests == (EditRequest("Mélanie was born in", "Rome", "Mélanie", None, "Lyon"),)
    assert record.rephrases == (Query("Mélanie is from", ("Rome",)),)
    assert record.locality == {"neighborhood": (Query("Ampère was born in", ("Lyon",)),)}
    assert record.domain is None


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ROME | {"requested_rewrite": REWRITE | {"target_new": {}}}, "'requested_rewrite.target_new.str' is missing"),
        (ROME | {"requested_rewrite": REWRITE | {"prompt": ""}}, "'requested_rewrite.prompt' is empty"),
        (ROME | {"requested_rewrite": [REWRITE]}, "must be one object; .* 'mquake'"),
        ({k: v for k, v in ROME.items() if k != "neighborhood_prompts"}, "'neighborhood_prompts' is missing"),
        ({k: v for k, v in EASYEDIT.items() if k != "ground_truth"}, "'ground_truth' is missing"),
        (EASYEDIT | {"locality_ground_truth": ""}, "'locality_ground_truth' is empty"),
        ({"fact": 1}, "'prompt' is missing"),
    ],
)
def test_malformed(write, row, reason):
    with pytest.raises(MalformedRecord, match=reason):
        list(read_counterfact(write([row])))


@pytest.mark.parametrize(
    ("name", "count", "rephrases", "neighbours", "portability"),
    [
        ("counterfact-train.json.gz", 9954, 1, 1, 0),
        ("counterfact-edit.json.gz", 9447, 1, 1, 0),
        ("counterfact-val.json.gz", 1909, 1, 1, 0),
        ("counterfact_filtered.json.gz", 1352, 2, 10, 0),
        ("counterfact_portability_gpt4.json.gz", 531, 2, 10, 1),
    ],
)
def test_real_files(real, name, count, rephrases, neighbours, portability):
    records = list(read_counterfact(real(f"counterfact/{name}")))
    assert len(records) == len({r.id for r in records}) == count
    assert all(r.request.subject and r.request.old_target for r in records)
    assert {len(r.rephrases) for r in records} == {rephrases}
    assert {len(r.locality["neighborhood"]) for r in records} == {neighbours}
    assert {len(r.portability) for r in records} == {portability}


def test_real_facts(real):
    easyedit = list(read_counterfact(real("counterfact/counterfact-train.json.gz")))
    assert easyedit[0].id == "2"
    assert easyedit[0].requests == (EditRequest("Toko Yasuda, the", "piano", "Toko Yasuda", None, "guitar"),)
    conflict = [r.request.target for r in easyedit if r.request.prompt == "What is the twin city of Wellington? It is"]
    assert conflict == ["Sheffield", "Sydney"]  # published so, and kept
    rome = next(read_counterfact(real("counterfact/counterfact_filtered.json.gz")))
    assert rome.domain == "P103"
    assert rome.locality["neighborhood"][0] == Query("The mother tongue of Léon Blum is", ("French",))
    assert (len(rome.generation), len(rome.attribute), rome.target_id) == (10, 10, "Q1860")
    assert len(set(rome.generation)) == 3  # published so: a prompt that is there more often weighs more


def test_a_file_of_another_format_is_refused(real):
    with pytest.raises(MalformedRecord, match=r"known_1000\.json, record 0: field 'target_new' is missing"):
        next(read_counterfact(real("counterfact/known_1000.json")))


def test_reference_texts(write):
    row = {"relation_id": "P19", "target_id": "Q220", "samples": [{"name": "A", "text": "A of Rome"}, {"text": "B"}]}
    more = row | {"samples": [{"text": "C"}]}
    assert read_snippets(write([row, row | {"target_id": "Q1", "samples": []}, more], "s.json")) == {
        ("P19", "Q220"): ("A of Rome", "B", "C"),
        ("P19", "Q1"): (),
    }
    for wrong, reason in (({}, "'relation_id' is missing"), (row | {"samples": [{}]}, "'text' is missing")):
        with pytest.raises(ValueError, match=f"record 1: field {reason}; .*attribute_snippets.json"):
            read_snippets(write([row, wrong or {"x": 1}], "s.json"))
