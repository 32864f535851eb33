import pytest

from datamodules.readers.errors import MalformedRecord
from datamodules.readers.zsre import declarative, read_zsre
from datamodules.records import Query

MEND = {
    "subject": "Zürichsee",
    "src": "Which country is Zürichsee in?",
    "pred": "Austria",
    "rephrase": "In what country is Zürichsee?",
    "alt": " Japan",
    "answers": ["Switzerland", "Schweiz", "Switzerland"],
    "loc": "nq question: who sang nq question: first",
    "loc_ans": "Nobody",
    "cond": "Austria >> Japan || Which country is Zürichsee in?",
}
PORTABILITY = {"Recalled Relation": "(Japan, capital, Tokyo)", "New Question": "Its capital?", "New Answer": "Tokyo"}


def test_mend_record(write):
    (record,) = read_zsre(write([MEND], "zsre_eval.json.gz"))
    request = record.request
    assert record.id == "zsre_eval-0"
    assert (request.prompt, request.target, request.subject) == (MEND["src"], "Japan", "Zürichsee")
    assert (request.old_target, request.text) == ("Switzerland", "Japan country is Zürichsee in.")
    assert record.rephrases == (Query("In what country is Zürichsee?", ("Japan",)),)
    assert record.locality == {"nq": (Query("who sang nq question: first", ("Nobody",)),)}
    assert record.portability == {}
    assert record.domain is None


def test_editing_towards_the_true_answer(write):
    path = write([MEND | {"portability": PORTABILITY, "inverse question": "x?", "alter_subject_question": "y?"}])
    (record,) = read_zsre(path, target="answer")
    assert (record.request.target, record.request.old_target) == ("Switzerland", None)
    assert record.rephrases[0].answers == ("Switzerland", "Schweiz")
    assert record.portability == {"subject_aliasing": (Query("y?", ("Switzerland", "Schweiz")),)}


def test_easyedit_additions(write):
    extra = {"portability": PORTABILITY, "inverse question": "What lies in Japan?", "alter_subject_question": "Z?"}
    (record,) = read_zsre(write([MEND | extra]))
    assert record.portability == {
        "one_hop": (Query("Its capital?", ("Tokyo",)),),
        "subject_aliasing": (Query("Z?", ("Japan",)),),
        "inverse": (Query("What lies in Japan?", ("Zürichsee",)),),
    }


def test_optional_fields_and_published_id(write):
    row = {"case_id": 12, "subject": "zürichsee", "src": MEND["src"], "rephrase": "r?", "alt": "Japan"}
    (record,) = read_zsre(write([row]))
    assert record.id == "12"
    assert record.request.subject is None  # not a part of the prompt, as it is spelled
    assert record.request.old_target is None
    assert record.locality == {}


@pytest.mark.parametrize(
    ("change", "target", "reason"),
    [
        ({"alt": ""}, "alt", "field 'alt' is empty"),
        ({"answers": []}, "answer", "field 'answers' is missing or empty, which target='answer' needs"),
        ({"loc_ans": 3}, "alt", "field 'loc_ans' must be text"),
        ({"portability": {"New Question": "q"}}, "alt", "field 'portability.New Answer' is missing"),
    ],
)
def test_malformed(write, change, target, reason):
    with pytest.raises(MalformedRecord, match=rf"bad\.json, record 1: {reason}"):
        list(read_zsre(write([MEND, MEND | change], "bad.json"), target=target))


def test_missing_field(write):
    for field in ("src", "alt", "rephrase"):
        row = {k: v for k, v in MEND.items() if k != field}
        with pytest.raises(MalformedRecord, match=f"record 0: field '{field}' is missing"):
            list(read_zsre(write([row])))


def test_unknown_target(write):
    with pytest.raises(ValueError, match="target must be 'alt' or 'answer', got 'pred'"):
        read_zsre(write([MEND]), target="pred")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("question", "answer", "statement"),
    [
        ("What is the capital of France?", "Paris", "Paris is the capital of France."),
        ("Who was Ada's father?", "Byron", "Byron was Ada's father."),
        ("what's the capital of France ?", "Paris", "Paris is the capital of France."),
        ("Whose direction is Kikujiro?", "Takeshi Kitano", "Takeshi Kitano's direction is Kikujiro."),
        ("In which city was Ada born?", "London", "In London city was Ada born."),
        ("Due to which disease did Ronald Tree die?", "stroke", "Due to stroke disease did Ronald Tree die."),
        ("What constellation is where NGC 362 is?", "Tucana", "Tucana constellation is where NGC 362 is."),
        ("The capital of France is what?", "Paris", "The capital of France is Paris."),
        ("The nationality of Ayerdhal is?", "French", "The nationality of Ayerdhal is French."),
        ("The country for When We Go To War was what?", "Fiji", "The country for When We Go To War was Fiji."),
        ("Player Scott Parse played for which team?", "Kings", "Player Scott Parse played for Kings team."),
        ("Who made it?", "Acme Inc.", "Acme Inc. made it."),
        ("What is C?", r"\1 and \g<wh>", r"\1 and \g<wh> is C."),
        ("When did Laika die?", "1957", "When did Laika die? 1957."),
        ("Why did Laika die?", "heat", "Why did Laika die? heat."),
        ("Was Laika male or female?", "female", "Was Laika male or female? female."),
        ("Capital of France", "Paris", "Capital of France Paris."),
        ("Is Whatcom in Ohio?", "no", "Is Whatcom in Ohio? no."),
    ],
)
def test_declarative(question, answer, statement):
    assert declarative(question, answer) == statement


def test_declarative_keeps_every_answer_of_a_real_file(real):
    records = list(read_zsre(real("zsre/zsre_mend_train_10000.json.gz")))
    assert all(r.request.target in r.request.statement and r.request.statement[-1] in ".!?" for r in records)
    swapped = [r for r in records if "?" not in r.request.statement]
    assert 0.95 < len(swapped) / len(records) < 1  # when, where, why, how, and yes-or-no questions are the rest
    assert records[1].request.statement == "1980 is the final year of Atlanta Flames."


@pytest.mark.parametrize(
    ("name", "count", "subjects", "portability"),
    [
        ("zsre/zsre_mend_train_10000.json.gz", 9992, 9992, set()),
        ("zsre/zsre_mend_eval_portability_gpt4.json", 537, 537, {"one_hop"}),
        ("zsre/zsre_subject_replace.json", 283, 279, {"subject_aliasing"}),
        ("zsre/zsre_inverse_relation.json", 367, 362, {"inverse"}),
    ],
)
def test_real_files(real, name, count, subjects, portability):
    records = list(read_zsre(real(name)))
    assert len(records) == len({r.id for r in records}) == count
    assert sum(r.request.subject is not None for r in records) == subjects
    assert all(set(r.portability) == portability for r in records)
    assert not any("nq question" in q.prompt for r in records for q in r.locality.get("nq", ()))


def test_real_records_with_an_empty_target(real):
    path = real("zsre/zsre_mend_train-1k.json.gz")
    with pytest.warns(UserWarning, match=r"skipped 2 of 999 records of .*: first: record 534: field 'alt' is empty"):
        assert len(list(read_zsre(path, on_error="skip"))) == 997
    assert len(list(read_zsre(path, target="answer"))) == 999


def test_real_facts(real):
    first = next(read_zsre(real("zsre/zsre_mend_eval_portability_gpt4.json")))
    assert (first.request.target, first.request.old_target) == ("2006", "1998")
    assert first.portability["one_hop"][0].target == "Athletics"
    assert first.locality["nq"][0] == Query("what is the name of the last episode of spongebob", ("The String",))
    inverse = next(read_zsre(real("zsre/zsre_inverse_relation.json")))
    assert inverse.portability["inverse"] == (Query("Who is Marian Clairmont's sister?", ("Claire Clairmont",)),)
    alias = next(read_zsre(real("zsre/zsre_subject_replace.json")))
    assert alias.portability["subject_aliasing"][0].prompt == "What is the constellation of UGC 6870?"
