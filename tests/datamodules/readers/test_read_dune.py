import gzip
import json
import warnings

import pytest

from datamodules.readers.dune import choices, read_dune
from datamodules.readers.errors import MalformedRecord, SkippedRecords
from datamodules.records import EditRequest, Query

CHOICE = "Which palms get warm?\nA. dry palms\nB) wet palms\nC. oily ones\nD. none"


@pytest.fixture
def dune(tmp_path):
    """Write one set: dune("new_info", edits, test_inputs)."""

    def _write(name, edits, inputs, key="edits", pack=False):
        path = tmp_path / f"{name}.json{'.gz' if pack else ''}"
        content = json.dumps({"edit_prompt": "x", key: edits, "test_inputs": inputs}, indent=1).encode()
        path.write_bytes(gzip.compress(content) if pack else content)
        return path

    return _write


def test_rows_of_one_edit_are_one_record(dune):
    path = dune("scientific", ["Rub.", "Heat.", "Rub."], [[CHOICE, "A"], [CHOICE, "B"], [CHOICE, "C"]])
    first, second = read_dune(path)
    assert (first.id, first.domain, first.requests) == ("scientific-0", "scientific", (EditRequest(text="Rub."),))
    assert first.portability == {
        "scientific": (Query(CHOICE, ("A. dry palms", "A")), Query(CHOICE, ("C. oily ones", "C")))
    }
    assert second.portability["scientific"][0].answers == ("B) wet palms", "B")
    assert (first.locality, first.rephrases, first.multi_hop) == ({}, (), ())


def test_stereotypes_and_their_key(dune):
    pairs = [["Who takes notes?\n", "The woman."], ["a", "b", "c"], ["Who cooks?\n", "the wife"]]
    with pytest.warns(
        SkippedRecords, match=r"debiasing_I\.json: 1 of its questions left .*_inputs\[0\]' is of 3 texts"
    ):
        (record,) = read_dune(dune("debiasing_I", ["Do not assume."], [pairs], key="edits:"))
    asked = (Query("Who takes notes?", ("The woman.",)), Query("Who cooks?", ("the wife",)))
    assert record.portability == {"debiasing_I": asked}


def test_an_answer_that_is_none_of_the_choices_is_left_out_and_told(dune):
    # as published: the third choice has the fourth one's letter
    spoilt = "Which helps?\nA. one crop\nB. monoculture\nD. crop rotation\nD. pesticides"
    path = dune("scientific", ["Rotate.", "Rub."], [[spoilt, "C"], [CHOICE, "b"]])
    dune("scientific_locality", ["", ""], [[CHOICE, "E"], ["Which one is it?", "E"]])
    told = r"2 of its questions .*, the first: 'test_inputs\[0\]' has the answer 'E' and the choices A, B, C, D"
    with pytest.warns(SkippedRecords, match=told):
        first, second = read_dune(path)
    assert first.portability == {"scientific": ()}
    assert second.portability == {"scientific": (Query(CHOICE, ("B) wet palms", "b")),)}
    assert first.locality == {
        "scientific": (Query("Which one is it?", ("E",)),)
    }  # no choices are found: the answer stands


def test_sums_answer_their_questions(dune):
    (record,) = read_dune(dune("arithmetic", ["82 / 2 + 41 = 82", "82 / 2 + 41 = 82"], ["How much?", "How many?"]))
    assert record.portability["arithmetic"] == (Query("How much?", ("82",)), Query("How many?", ("82",)))


def test_locality_is_dealt_out_in_turn(dune):
    path = dune("new_info", ["one", "two"], [[[CHOICE, "A"]], [[CHOICE, "B"]]])
    dune("new_info_locality", ["", ""], [[["q1", "a1"], ["q2", "a2"]], [["q3", "a3"]]], pack=True)
    records = list(read_dune(path))
    asked = [[q.prompt for q in r.locality["new_info"]] for r in records]
    assert asked == [["q1", "q3"], ["q2"]]
    assert [r.locality for r in read_dune(path, locality=False)] == [{}, {}]


def test_locality_that_is_asked_for_must_be_there(dune):
    path = dune("new_info", ["one"], [[[CHOICE, "A"]]])
    assert next(read_dune(path)).locality == {}
    with pytest.raises(FileNotFoundError, match=r"new_info_locality\.json \(or \.gz\)"):
        list(read_dune(path, locality=True))
    dune("new_info_locality", [""], [[1]])
    with pytest.raises(
        ValueError, match=r"new_info_locality\.json: field 'test_inputs\[0\]' must be .*locality: false"
    ):
        list(read_dune(path))


def test_choices():
    assert choices(CHOICE) == {"A": "A. dry palms", "B": "B) wet palms", "C": "C. oily ones", "D": "D. none"}
    assert choices("Why? (A) it is (as so often) late (B) it rains") == {
        "A": "(A) it is (as so often) late",
        "B": "(B) it rains",
    }
    assert choices("When? (1) before (2) after") == {"1": "(1) before", "2": "(2) after"}
    assert choices("A. Yes\nalways.\nB. No\nA. again") == {"A": "A. Yes", "B": "B. No"}
    assert choices("4. Which?\nA. dry\nB. wet") == {"A": "A. dry", "B": "B. wet"}  # the question's own number


@pytest.mark.parametrize(
    ("question", "found"),
    [
        ("Mass?\nA. 5g. B. Less, by 5g. C. More.", ["A. 5g.", "B. Less, by 5g.", "C. More."]),
        # commas of the choices that became lines
        ("1. Why?\nA. Yes\nif wet. B. No\nnever. C. It depends.", ["A. Yes", "B. No", "C. It depends."]),
        (
            "How long?\nA. 24 hours.\nB. 365 days.,C. 27 days.\nD. 9",
            ["A. 24 hours.", "B. 365 days.", "C. 27 days.", "D. 9"],
        ),
        ("Which?\nA) B.1.351 lineage\nB) P.1 lineage", ["A) B.1.351 lineage", "B) P.1 lineage"]),
        ("When? (A) 6:00 A.M. (B) 10:00 A.M.", ["(A) 6:00 A.M.", "(B) 10:00 A.M."]),
        ("Which?\nA. one\nB. two\nD. four", ["A. one", "B. two", "D. four"]),
    ],
)
def test_choices_within_lines(question, found):
    assert list(choices(question).values()) == found


def test_no_choices():
    assert choices("Who is it?") == {}


@pytest.mark.parametrize(
    ("edits", "inputs", "reason"),
    [
        (["a", ""], [["q", "a"]] * 2, "record 1: field 'edits' is ''; files of locality hold no edits"),
        ([3], [["q", "a"]], "record 0: field 'edits' is 3"),
        (["a"], [["q"]], r"record 0: field 'test_inputs\[0\]' must be \[question, answer\]"),
        (["a", "b"], [["q", "a"], [["q", 1]]], r"record 1: field 'test_inputs\[1\]' must be"),
        (["a"], ["q"], r"field 'edits\[0\]' is 'a': a question without an answer needs"),
        (["a"], [["q", " "]], "needs at least one non-empty answer"),
    ],
)
def test_malformed(dune, edits, inputs, reason):
    with pytest.raises(MalformedRecord, match=rf"new_info\.json, .*{reason}"):
        list(read_dune(dune("new_info", edits, inputs)))


def test_files_that_are_not_dune(dune, tmp_path):
    path = dune("mine", ["a"], [["q", "a"]])
    with pytest.raises(ValueError, match=r"mine\.json: its name tells no set .*subset: one of new_info, scientific"):
        read_dune(path)
    assert next(read_dune(path, subset="scientific")).id == "scientific-0"
    with pytest.raises(ValueError, match=r"must be lists of one length, found \{'edits': 2, 'test_inputs': 1\}"):
        read_dune(dune("scientific", ["a", "b"], [["q", "a"]]))


@pytest.mark.parametrize(
    ("name", "records", "questions", "locality"),
    [
        ("new_info.json", 150, 750, 471),
        ("scientific.json.gz", 177, 1203, 450),  # 1,204 published, one of them spoilt
        ("debiasing_I.json", 110, 697, 700),
        ("debiasing_II.json.gz", 150, 1199, 1052),  # 1,200 published, one of them spoilt
        ("arithmetic.json", 143, 835, 429),
    ],
)
def test_real_files(real, name, records, questions, locality):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        every = list(read_dune(real(f"dune/{name}")))
    assert len(told) == (name in ("scientific.json.gz", "debiasing_II.json.gz"))
    assert len(every) == len({r.request.text for r in every}) == records
    assert sum(len(r.portability[r.domain or ""]) for r in every) == questions
    assert sum(len(qs) for r in every for qs in r.locality.values()) == locality


def test_real_facts(real):
    with pytest.warns(SkippedRecords, match=r"1 of its questions .*_inputs\[480\]' has the answer 'C' .* A, B, D"):
        first, *others = read_dune(real("dune/scientific.json.gz"))
    assert (first.request.text or "").startswith("Dry palms produce the most friction")
    assert first.portability["scientific"][0].answers == ("A. dry palms", "A")
    asked = [q for r in (first, *others) for q in r.portability["scientific"]]
    assert all(q.target.lstrip("(")[0] == q.answers[1].upper() for q in asked)  # each letter names a line
    sums = list(read_dune(real("dune/arithmetic.json")))
    assert [q.target for q in sums[0].portability["arithmetic"]] == ["82"] * 3
