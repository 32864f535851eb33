import pytest

from datamodules.readers.base import MalformedRecord
from datamodules.readers.mquake import read_mquake
from datamodules.records import EditRequest, Query


def rewrite(subject, new, true, relation="P27", **extra):
    return {
        "prompt": "{} is a citizen of",
        "relation_id": relation,
        "target_new": {"str": new},
        "target_true": {"str": true},
        "subject": subject,
        "question": f"Of what country is {subject}?",
    } | extra


CASE = {
    "case_id": 23,
    "requested_rewrite": [rewrite("Zoë", "Oman", "Peru"), rewrite("Oman", "Mars", "Asia", "P30", question="")],
    "questions": ["Who rules Zoë's country? ", "Who rules?", "Who?"],
    "answer": "Boluarte",
    "answer_alias": [],
    "new_answer": "Haitham",
    "new_answer_alias": ["Sultan", "Haitham", ""],
    "new_single_hops": [
        {"question": "Q1?", "cloze": "C1", "answer": "Oman", "answer_alias": ["OM"]},
        {"question": "", "cloze": "C2", "answer": "Haitham", "answer_alias": []},
    ],
}


def test_case(write):
    (record,) = read_mquake(write([CASE]))
    assert record.id == "23"
    assert record.requests == (
        EditRequest("Zoë is a citizen of", "Oman", "Zoë", None, "Peru"),
        EditRequest("Oman is a citizen of", "Mars", "Oman", None, "Asia"),
    )
    assert record.rephrases == (Query("Of what country is Zoë?", ("Oman",)),)
    assert [q.prompt for q in record.multi_hop] == ["Who rules Zoë's country?", "Who rules?", "Who?"]
    assert {q.answers for q in record.multi_hop} == {("Haitham", "Sultan")}
    assert record.portability == {"single_hop": (Query("Q1?", ("Oman", "OM")), Query("C2", ("Haitham",)))}
    assert record.domain is None  # two relations


def test_domain_of_one_relation(write):
    (record,) = read_mquake(write([CASE | {"requested_rewrite": [rewrite("a", "b", "c"), rewrite("d", "e", "f")]}]))
    assert record.domain == "P27"


def test_paragraphs_of_akew(write):
    path = write([CASE | {"requested_rewrite": [rewrite("Zoë", "Oman", "Peru", fact_new_uns="Zoë lives.")]}])
    assert next(read_mquake(path)).request.text is None
    request = next(read_mquake(path, unstructured=True)).request
    assert (request.statement, request.target) == ("Zoë lives.", "Oman")
    with pytest.raises(MalformedRecord, match=r"fact_new_uns' is missing; unstructured=True"):
        list(read_mquake(write([CASE]), unstructured=True))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"requested_rewrite": rewrite("a", "b", "c")}, "'requested_rewrite' must be a list of objects, not dict"),
        ({"requested_rewrite": []}, "has no edit request"),
        ({"requested_rewrite": [rewrite("a", "", "c")]}, "'target_new.str' is empty"),
        ({"questions": []}, "'questions' is missing"),
        ({"new_answer": ""}, "'new_answer' is empty"),
        ({"new_single_hops": [{"answer": "x"}]}, "'cloze' is missing"),
    ],
)
def test_malformed(write, change, reason):
    with pytest.raises(MalformedRecord, match=rf"record 0 \(id 23\): .*{reason}"):
        list(read_mquake(write([CASE | change])))


@pytest.mark.parametrize(
    ("name", "count", "edits", "hops"),
    [
        ("MQuAKE-CF-3k.json.gz", 2500, 5260, 7600),
        ("MQuAKE-hard.json.gz", 229, 916, 916),
        ("MQuAKE-CF.akew.json.gz", 226, 287, 644),
    ],
)
def test_real_files(real, name, count, edits, hops):
    records = list(read_mquake(real(f"mquake/{name}")))
    assert len(records) == len({r.id for r in records}) == count
    assert sum(len(r.requests) for r in records) == sum(len(r.rephrases) for r in records) == edits
    assert sum(len(r.portability["single_hop"]) for r in records) == hops
    assert {len(r.multi_hop) for r in records} == {3}
    assert all(request.subject for r in records for request in r.requests)


def test_real_facts(real):
    first = next(read_mquake(real("mquake/MQuAKE-CF-3k.json.gz")))
    assert first.id == "1"
    assert first.requests == (
        EditRequest("Ellie Kemper is a citizen of", "Croatia", "Ellie Kemper", old_target="United States of America"),
    )
    assert first.multi_hop[0].answers == ("Kolinda Grabar-Kitarović", "Grabar-Kitarović")
    akew = list(read_mquake(real("mquake/MQuAKE-CF.akew.json.gz"), unstructured=True))
    assert all(len(request.text or "") > 50 for r in akew for request in r.requests)
    assert (akew[0].request.text or "").startswith("Croatia, a country located in Southeast Europe")
