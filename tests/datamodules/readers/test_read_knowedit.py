import pytest

from datamodules.readers.errors import MalformedRecord
from datamodules.readers.knowedit import read_knowedit
from datamodules.records import EditRequest, Query

ROW = {
    "subject": "Léo",
    "prompt": "The country of Léo is",
    "target_new": "Syria",
    "ground_truth": "France",
    "rephrase": "Léo comes from",
    "portability": {
        "Reasoning": [
            {"prompt": "Currency of Léo's country?", "ground_truth": [["pound", "SYP", "pound"], [], ["", "lira"]]},
            {"prompt": "Anthem?", "ground_truth": "Humat"},
        ],
        "Logical_Generalization": [{"prompt": "Child of Léo?", "ground_truth": [[], []]}],
        "Subject_Aliasing": [],
    },
    "locality": {
        "Relation_Specificity": [{"prompt": " ", "ground_truth": ["x"]}, {"prompt": "Mother?", "ground_truth": ["Ir"]}],
        "Forgetfulness": None,
    },
}


def test_record(write):
    (record,) = read_knowedit(write([ROW], "test_cf.json"))
    assert record.id == "test_cf-0"
    assert record.requests == (EditRequest("The country of Léo is", "Syria", "Léo", None, "France"),)
    assert record.rephrases == (Query("Léo comes from", ("Syria",)),)
    # questions without answers or prompt, and kinds left empty by that, are gone
    assert record.portability == {
        "Reasoning": (Query("Currency of Léo's country?", ("pound", "SYP", "lira")), Query("Anthem?", ("Humat",)))
    }
    assert record.locality == {"Relation_Specificity": (Query("Mother?", ("Ir",)),)}


def test_variants(write):
    row = {
        "case_id": 3,
        "prompt": "p of S",
        "target_new": ["t", "T", "t"],
        "rephrase_prompt": "r",
        "ground_truth": [""],
    }
    (record,) = read_knowedit(write([row]))
    assert record.id == "3"
    assert record.requests == (EditRequest("p of S", "t"),)
    assert record.rephrases == (Query("r", ("t", "T")),)
    assert (record.locality, record.portability) == ({}, {})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"target_new": ""}, "field 'target_new' is empty"),
        ({"target_new": []}, "field 'target_new' is empty"),
        ({"portability": []}, None),
        ({"portability": ["x"]}, "field 'portability' must be an object of kinds, not list"),
        ({"portability": {"Reasoning": {"prompt": "p"}}}, "field 'Reasoning' must be a list of objects, not dict"),
        ({"portability": {"Reasoning": [{"prompt": "p"}]}}, "field 'portability.Reasoning.ground_truth' is missing"),
        ({"locality": {"F": [{"ground_truth": "p"}]}}, "field 'locality.F.prompt' is missing"),
        ({"locality": {"F": [{"prompt": "p", "ground_truth": [1]}]}}, "field 'ground_truth' must hold text"),
    ],
)
def test_malformed(write, change, reason):
    path = write([ROW | change])
    if reason is None:  # an empty list is how some published records write "none"
        assert next(read_knowedit(path)).portability == {}
        return
    with pytest.raises(MalformedRecord, match=reason):
        list(read_knowedit(path))


@pytest.mark.parametrize(
    ("name", "count", "portability", "locality", "rephrased"),
    [
        ("ZsRE-test-all.json.gz", 929, 415 + 260 + 254, 1858, 929),
        ("wiki_counterfact/test_cf.json.gz", 639, 1494 + 299 + 1785, 4184 + 361, 639),
        ("wiki_counterfact/train_cf.json.gz", 1427, 503 + 304 + 1409, 1253 + 781, 0),
        # 1645 published questions on specificity, 7 of them without an answer
        ("wiki_recent/recent_train.json.gz", 569, 476 + 223 + 52, 1645 - 7 + 297, 0),
    ],
)
def test_real_files(real, name, count, portability, locality, rephrased):
    records = list(read_knowedit(real(f"knowedit/{name}")))
    assert len(records) == len({r.id for r in records}) == count
    assert all(r.request.subject for r in records)
    assert sum(len(queries) for r in records for queries in r.portability.values()) == portability
    assert sum(len(queries) for r in records for queries in r.locality.values()) == locality
    assert sum(len(r.rephrases) for r in records) == rephrased


def test_real_facts(real):
    first = next(read_knowedit(real("knowedit/wiki_counterfact/test_cf.json.gz")))
    assert (first.request.target, first.request.old_target) == ("Syria", "United States of America")
    assert first.portability["Reasoning"][0].answers == ("Syrian pound", "SYP", "LS", "Syrian lira")
    assert "🇸🇾" in first.portability["Subject_Aliasing"][0].answers
    recent = list(read_knowedit(real("knowedit/wiki_recent/recent_train.json.gz")))
    assert recent[0].request.old_target is None
    prompts = [q.prompt for q in recent[138].locality["Relation_Specificity"]]
    assert prompts
    assert "The name of the position held by Paul de Gerlache is" not in prompts  # published with [[], []]
    train = list(read_knowedit(real("knowedit/wiki_counterfact/train_cf.json.gz")))
    assert train[629].request.old_target is None  # published with an empty ground truth
    assert train[629].request.target == "Steen, Tidemann"
