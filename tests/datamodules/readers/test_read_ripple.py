import pytest

from datamodules.readers.errors import MalformedRecord
from datamodules.readers.ripple import LOCALITY, PORTABILITY, parted, read_ripple
from datamodules.records import EditRecord, EditRequest, Query


def asked(prompt, *answers):
    return {"prompt": prompt, "answers": [{"value": value, "aliases": aliases} for value, *aliases in answers]}


def trial(queries, conditions=()):
    return {"test_queries": list(queries), "test_condition": "OR", "condition_queries": list(conditions)}


EYES = asked("The eye color of Léo is", ("blue", "blue eyes"))
PAPERS = asked("The name of the currency in the country of citizenship of Léo is", ("pound", "SYP"), ("lira",))
EDIT = {
    "prompt": "The name of the country of citizenship of Léo is Syria.",
    "relation": "COUNTRY_OF_CITIZENSHIP",
    "previous_fact": {"prompt": "The name of the country of citizenship of Léo is France."},
}
ROW = {"example_type": "popular", "edit": EDIT} | {kind: [] for kind in (*PORTABILITY, *LOCALITY)}
ROW |= {
    "Relation_Specificity": [trial([EYES], [EYES])],
    "Compositionality_I": [trial([PAPERS], [asked("The name of the currency in Syria is", ("pound",)), asked("x")])],
    "Logical_Generalization": [trial([asked("The names of the siblings of Syria are")])],
}


def test_record(write):
    (record,) = read_ripple(write([ROW], "popular.json"))
    assert record.id == "popular-0"
    prompt = "The name of the country of citizenship of Léo is"
    assert record.requests == (EditRequest(prompt, "Syria", "Léo", old_target="France"),)
    eyes = Query("The eye color of Léo is", ("blue", "blue eyes"))
    assert record.locality == {"Relation_Specificity": (Query(eyes.prompt, eyes.answers, conditions=(eyes,)),)}
    # conditions and questions without an answer are gone, and so is the kind that had no other
    condition = Query("The name of the currency in Syria is", ("pound",))
    asks = Query(PAPERS["prompt"], ("pound", "SYP", "lira"), conditions=(condition,))
    assert record.portability == {"Compositionality_I": (asks,)}
    assert record.domain == "COUNTRY_OF_CITIZENSHIP"
    assert EditRecord.from_json(record.to_json()) == record


def test_a_recent_fact_has_no_previous_one(write):
    edit = {"prompt": "Night follows day.", "relation": "FOLLOWS"}
    (record,) = read_ripple(write([ROW | {"edit": edit}]))
    assert record.requests == (EditRequest("Night follows", "day", "Night"),)


@pytest.mark.parametrize(
    ("relation", "statement", "parts"),
    [
        (
            "SIBLING",
            "The names of the siblings of Bo are Al Jr..",
            ("The names of the siblings of Bo are", "Bo", "Al Jr."),
        ),
        ("PLACE_OF_BIRTH", "The place of birth of A of B is C", ("The place of birth of A of B is", "A of B", "C")),
        ("FOLLOWED_BY", "It is is followed by X.", ("It is is followed by", "It is", "X")),
        ("ANTHEM", "The name of the anthem of Peru is O.", ("The name of the anthem of Peru is", "Peru", "O")),
    ],
)
def test_statements_are_parted_by_their_relation(relation, statement, parts):
    assert parted(statement, relation) == parts


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"edit": EDIT | {"relation": "SPOUSE"}}, "'edit.prompt' is .*not 'The name of the spouse of <subject> is'"),
        ({"edit": {"prompt": "a"}}, "'edit.relation' is missing"),
        ({"Forgetfulness": None}, "'Forgetfulness' must be a list of objects"),
        ({"Forgetfulness": [{"condition_queries": []}]}, "'Forgetfulness.test_queries' is missing"),
        ({"Forgetfulness": [trial([{"prompt": "p"}])]}, "'Forgetfulness.test_queries.answers' is missing"),
    ],
)
def test_malformed(write, change, reason):
    with pytest.raises(MalformedRecord, match=rf"record 0: field {reason}"):
        list(read_ripple(write([ROW | change])))


def test_real_file(real):
    records = list(read_ripple(real("ripple/gpt-j-popular.json.gz")))
    assert len(records) == len({r.id for r in records}) == 543
    assert all(r.request.subject and r.request.old_target for r in records)
    found = {
        kind: sum(len(getattr(r, sort).get(kind, ())) for r in records)
        for sort, kinds in (("portability", PORTABILITY), ("locality", LOCALITY))
        for kind in kinds
    }
    assert found == {
        "Logical_Generalization": 164,  # 349 published, 185 without an answer
        "Compositionality_I": 235,
        "Compositionality_II": 23,
        "Subject_Aliasing": 15,
        "Relation_Specificity": 613,
        "Forgetfulness": 0,
    }
    queries = [q for r in records for kinds in (r.portability, r.locality) for qs in kinds.values() for q in qs]
    assert sum(len(q.conditions) for q in queries) == 613 + 235 + 30 + 23 + 15
    assert records[0].request.target == "Syria"
