import pytest

from datamodules.readers.errors import DataError, MalformedRecord
from datamodules.readers.pairs import read_hub, read_pairs
from datamodules.records import EditRequest, Query

SQUAD = {
    "context": "Ada wrote notes.",
    "question": "Who wrote?",
    "answers": {"text": ["Ada", "ada"], "answer_start": [0]},
}


def test_abstract_and_title(write):
    rows = [{"abstract": "A långt text.\nTwo.", "title": "T"}, {"abstract": "B", "title": "U"}]
    records = list(read_pairs(write(rows, "s2orc.jsonl.gz"), edit="abstract", text="title"))
    assert [r.id for r in records] == ["s2orc-0", "s2orc-1"]
    assert records[0].requests == (EditRequest(text="A långt text.\nTwo."),)
    assert records[0].rephrases == (Query("", ("T",)),)


def test_stem_and_nested_columns(write):
    (record,) = read_pairs(write([SQUAD]), edit="context", text="answers.text", stem="question")
    assert record.request.statement == "Ada wrote notes."
    assert record.rephrases == (Query("Who wrote?", ("Ada",)),)


def test_rows_in_place_of_a_file():
    records = read_pairs([SQUAD, SQUAD], "context", "answers.text", name="squad")
    assert [r.id for r in records] == ["squad-0", "squad-1"]
    assert next(read_pairs([SQUAD], "context", "question")).id == "pairs-0"
    with pytest.raises(ValueError, match="nothing to read in pairs"):
        list(read_pairs([], "context", "question"))


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"edit": "abstract", "text": "question"}, "field 'abstract' is missing"),
        ({"edit": "context", "text": "answers.start"}, "field 'answers.start' is missing"),
        ({"edit": "context", "text": "answers.answer_start"}, "field 'answers.answer_start' must be text, not int"),
        ({"edit": "context", "text": "question", "stem": "q"}, "field 'q' is missing"),
    ],
)
def test_malformed(write, columns, reason):
    with pytest.raises(MalformedRecord, match=rf"squad\.json, record 0: {reason}"):
        list(read_pairs(write([SQUAD], "squad.json"), **columns))


def test_unanswerable_questions_can_be_skipped(write):
    rows = [SQUAD, SQUAD | {"answers": {"text": []}}]
    with pytest.warns(UserWarning, match="skipped 1 of 2 records .*field 'answers.text' is empty"):
        assert len(list(read_pairs(write(rows), "context", "answers.text", on_error="skip"))) == 1


def test_datasets_loads_a_local_folder(write, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = write([SQUAD, SQUAD], "train.jsonl").parent
    records = list(read_hub(str(folder), None, "train", edit="context", text="answers.text", stem="question"))
    assert [r.rephrases for r in records] == [(Query("Who wrote?", ("Ada",)),)] * 2
    assert records[1].request == EditRequest(text="Ada wrote notes.")
    with pytest.raises(DataError, match=r"cannot load dataset .*split 'nosuch'"):
        read_hub(str(folder), None, "nosuch", edit="context", text="question")


def test_hub_arguments_and_failure(monkeypatch):
    datasets = pytest.importorskip("datasets")
    seen = {}

    def load_dataset(*args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"dataset 'some/set' .*'main'.*no route.*JSON Lines.*'pairs'"):
        read_hub("some/set", "sub", "train", "a", "b", revision="main")
    assert seen == {"args": ("some/set", "sub"), "kwargs": {"split": "train", "revision": "main", "streaming": False}}


def test_real_rows_of_a_general_set(real):
    records = list(read_pairs(real("general/openbookqa/test.json"), edit="instruction", text="output"))
    assert len(records) == 400
    assert all(r.request.text and r.rephrases[0].prompt == "" for r in records)


@pytest.mark.parametrize(
    ("key", "expected"), [(1, "a whale"), ("B", "a whale"), ("2", "a whale"), ("c", "a bat"), (0, "a cow")]
)
def test_the_right_choice_of_a_question_is_the_text(key, expected):
    columns = {
        "fact": "Whales are mammals.",
        "q": "Which one swims?",
        "a": "a cow",
        "b": "a whale",
        "c": "a bat",
        "k": key,
    }
    nested = {
        "fact": "Whales are mammals.",
        "q": "Which one swims?",
        "o": {"text": ["a cow", "a whale", "a bat"]},
        "k": key,
    }
    for row, text in ((columns, ["a", "b", "c"]), (nested, "o.text")):
        record = next(read_pairs([row], edit="fact", text=text, stem="q", key="k"))
        assert record.rephrases[0].prompt == "Which one swims?"
        assert record.rephrases[0].target == expected


@pytest.mark.parametrize("key", [7, "Z", None, -1])
def test_a_key_that_names_no_choice_is_refused(key):
    row = {"fact": "Whales are mammals.", "a": "a cow", "b": "a whale", "k": key}
    with pytest.raises(MalformedRecord, match="'k'"):
        next(read_pairs([row], edit="fact", text=["a", "b"], key="k"))
