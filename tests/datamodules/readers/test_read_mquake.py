import pytest

from datamodules.readers.errors import MalformedRecord
from datamodules.readers.mquake import conflicting, read_few_shot, read_mquake
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
    assert {q.criteria for q in record.multi_hop} == {("2_hops", "2_edits")}
    assert record.portability == {"single_hop": (Query("Q1?", ("Oman", "OM")), Query("C2", ("Haitham",)))}
    assert record.domain is None  # two relations


def test_what_only_the_temporal_set_has_is_not_needed(write):
    assert list(read_mquake(write([CASE | {"answer_extended": ["B"]}]))) == list(read_mquake(write([CASE])))


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


def chain(name, edited, *hops):
    """A case that edits (subject, new) and rests on hops (subject, answer, alias, ...), all of one relation."""
    asked = [
        {"question": f"Of what country is {s}?", "cloze": f"{s} is", "answer": a, "answer_alias": more}
        for s, a, *more in hops
    ]
    return CASE | {
        "case_id": name,
        "requested_rewrite": [rewrite(subject, new, "x") for subject, new in edited],
        "new_single_hops": asked,
    }


def test_conflicts_across_cases(write):
    rows = [
        chain("rests on Bo", [("Al", "Bo")], ("Al", "Bo"), ("Bo", "Chad", "TD")),
        chain("edits Bo", [("Bo", "Oman")], ("Bo", "Oman")),
        chain("says the same", [("Cy", "Fiji")], ("Cy", "Fiji")),
        chain("rests on Cy", [("Di", "Cy")], ("Di", "Cy"), ("Cy", "Republic of Fiji", "Fiji")),
    ]
    records = list(read_mquake(write(rows)))
    assert conflicting(records) == [True, False, False, False]
    assert conflicting(records[:1]) == [False]  # nothing contradicts it alone
    kept = [r.id for r in read_mquake(write(rows), conflicts=False)]
    assert kept == ["edits Bo", "says the same", "rests on Cy"]
    assert records[0].multi_hop[0].criteria == ("2_hops", "1_edit")


def test_two_cases_that_edit_one_fact_differently_contradict_each_other(write):
    rows = [chain(str(i), [("Bo", new)], ("Bo", new)) for i, new in enumerate(["Oman", "Chad", "Oman"])]
    records = list(read_mquake(write(rows)))
    assert conflicting(records) == [True, True, True]
    assert conflicting(records[::2]) == [False, False]


@pytest.mark.parametrize(("name", "out"), [("MQuAKE-CF-3k", 674), ("MQuAKE-hard", 2), ("MQuAKE-CF.akew", 11)])
def test_conflicts_of_real_files(real, name, out):
    path = real(f"mquake/{name}.json.gz")
    records = list(read_mquake(path))
    assert sum(conflicting(records)) == out
    assert len(list(read_mquake(path, conflicts=False))) == len(records) - out


def test_demonstrations(tmp_path):
    shown, relations = tmp_path / "multihop-prompts.txt", tmp_path / "rel-prompts.json"
    shown.write_text("Q: a? A: b\n", encoding="utf-8")
    relations.write_text('{"P1": "Q: c? A: d"}', encoding="utf-8")
    assert read_few_shot(shown) == {"multi_hop": "Q: a? A: b"}
    assert read_few_shot(shown, relations) == {"multi_hop": "Q: a? A: b", "relations": {"P1": "Q: c? A: d"}}
    relations.write_text('{"P1": ["Q"]}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"rel-prompts\.json: field 'P1' must be text"):
        read_few_shot(shown, relations)
    with pytest.raises(FileNotFoundError, match="of demonstrations"):
        read_few_shot(tmp_path / "nowhere.txt")
    shown.write_text(" ", encoding="utf-8")
    with pytest.raises(ValueError, match="is empty"):
        read_few_shot(shown)
