import gzip
import warnings

import pytest

from datamodules.readers import FORMATS, read
from datamodules.readers.base import load_rows, read_all
from datamodules.readers.errors import MalformedRecord
from datamodules.readers.fields import items, text, texts
from datamodules.records import EditRecord, EditRequest, Query

ROWS = [{"p": "Zürich liegt in", "t": "東京"}, {"p": "a", "t": "b"}]


def convert(row, index):
    return EditRecord(str(index), (EditRequest(text(row, "p"), text(row, "t")),))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.gz"])
def test_rows_of_every_packing_are_the_same(write, name):
    assert list(load_rows(write(ROWS, name))) == ROWS


def test_byte_order_mark_blank_lines_and_indented_arrays(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\n\n{"a": 2}\n')
    assert list(load_rows(path)) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'\xef\xbb\xbf\n[\n {"a": 1},\n {"a": 2}\n]\n')
    assert list(load_rows(path)) == [{"a": 1}, {"a": 2}]


def test_json_lines_are_read_one_by_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\nbroken', encoding="utf-8")
    assert next(load_rows(path)) == {"a": 1}


def test_missing_file_is_named_at_the_call(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data file .*nowhere\.json.*check the configured path"):
        load_rows(tmp_path / "nowhere.json")


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[\n]"])
def test_no_records_is_an_error(tmp_path, content):
    path = tmp_path / "empty.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"empty\.json holds no records"):
        list(load_rows(path))


@pytest.mark.parametrize(
    ("content", "line"), [('{"a": 1}\n\n{"a": \n', 3), ('[{"a": 1},\n{"a": }]', 2), ('\n[{"a": 1}', 2), ("[1]\n[2]", 2)]
)
def test_broken_json_names_file_and_line(tmp_path, content, line):
    path = tmp_path / "broken.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"broken\.json, line {line}: broken JSON"):
        list(load_rows(path))


def test_damaged_files_are_named(tmp_path):
    cut, plain, latin = tmp_path / "cut.json.gz", tmp_path / "plain.json.gz", tmp_path / "latin.json"
    cut.write_bytes(gzip.compress(b'[{"a": "' + bytes(range(32, 127)) * 50 + b'"}]')[:-20])
    plain.write_bytes(b"[]")
    latin.write_bytes('[{"a": "Zürich"}]'.encode("latin-1"))
    for path in (cut, plain, latin):
        with pytest.raises(ValueError, match=rf"{path.name} is damaged or not utf-8"):
            list(load_rows(path))


def test_order_duplicates_and_unicode_are_kept(write):
    records = list(read_all(load_rows(write([*ROWS, ROWS[0]])), "x", convert))
    assert [r.request.target for r in records] == ["東京", "b", "東京"]
    assert records[0].request == records[2].request


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"case_id": 7, "p": "a"}, r"record 1 \(id 7\): field 't' is missing"),
        ({"p": "a", "t": " "}, "record 1: field 't' is empty"),
        ({"p": "a", "t": 3}, "record 1: field 't' must be text, not int"),
        ({"p": "a", "t": None}, "record 1: field 't' must be text, not NoneType"),
        ({"p": "a", "t": []}, "record 1: field 't' is empty"),
        ("text", "record 1: a record must be a JSON object, not str"),
    ],
)
def test_malformed_record_names_file_record_field_and_remedy(write, row, reason):
    reader = read_all(load_rows(write([ROWS[0], row])), "some/file.json", convert)
    assert next(reader).id == "0"
    with pytest.raises(MalformedRecord, match=rf"^some/file\.json, {reason}; .*on_error='skip'"):
        next(reader)


def test_skipping_counts_and_warns_once():
    rows = [{}, ROWS[0], {"p": "a"}, ROWS[1]]
    with pytest.warns(UserWarning, match="skipped") as caught:
        records = list(read_all(rows, "f.json", convert, "skip"))
    assert [r.id for r in records] == ["1", "3"]
    assert [str(w.message) for w in caught] == [
        "skipped 2 of 4 records of f.json: first: record 0: field 'p' is missing"
    ]


def test_nothing_skipped_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(read_all(ROWS, "f.json", convert, "skip"))) == 2


def test_a_source_without_a_good_record_is_an_error():
    with pytest.raises(ValueError, match=r"none of its 2 records can be read, first: record 0: field 'p' is missing"):
        list(read_all([{}, {}], "f.json", convert, "skip"))
    with pytest.raises(ValueError, match=r"nothing to read in f\.json: it holds no records"):
        list(read_all([], "f.json", convert))


def test_other_errors_are_not_taken_for_bad_data():
    def broken(row, index):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(read_all(ROWS, "f.json", broken, "skip"))


def test_unknown_on_error_at_the_call():
    with pytest.raises(ValueError, match="on_error must be 'raise' or 'skip', got 'ignore'"):
        read_all(ROWS, "f.json", convert, "ignore")  # pyright: ignore[reportArgumentType]


def test_text_follows_dotted_paths_and_first_elements():
    row = {"a": {"b": [[" x "], "y"]}, "c": [{"d": "z"}], "a.b": "dotted", "e.f": "name"}
    assert text({"a": row["a"]}, "a.b") == "x"
    assert text(row, "c.d") == "z"
    assert text(row, "e.f") == "name"
    assert text(row, "a.b") == "dotted"
    with pytest.raises(KeyError, match=r"c\.x"):
        text(row, "c.x")
    with pytest.raises(KeyError, match=r"c\.d\.e"):
        text(row, "c.d.e")


def test_texts_flattens_in_order_and_drops_empties():
    assert texts({"a": [["b", " "], [], None, " a", ["b"]]}, "a") == ("b", "a", "b")
    assert texts({}, "a") == ()
    assert texts({"a": "x"}, "a") == ("x",)
    with pytest.raises(TypeError, match="field 'a' must hold text or lists of text, not int"):
        texts({"a": ["x", 1]}, "a")


def test_items_wants_a_list_of_objects():
    assert items({"a": [{}]}, "a") == [{}]
    for wrong in ({}, "x", [1]):
        with pytest.raises(TypeError, match="field 'a' must be a list of objects"):
            items({"a": wrong}, "a")


def test_read_knows_formats_and_options(write):
    made = {"facts", "facts_uniedit"}
    published = {"zsre", "counterfact", "knowedit", "mquake", "uniedit", "dune", "ripple"}
    assert published | {"pairs", "records", "hub", "auto"} | made == set(FORMATS)
    path = write([{"prompt": "p", "target_new": "t"}])
    assert [r.request.target for r in read("knowedit", path)] == ["t"]
    with pytest.raises(ValueError, match=r"unknown format 'zrse'; known formats: auto, counterfact, .*zsre"):
        read("zrse", path)
    with pytest.raises(ValueError, match=r"format 'knowedit'.*'targte'.*parameters of its reader are: path, on_error"):
        read("knowedit", path, targte="alt")
    with pytest.raises(ValueError, match=r"format 'pairs': missing a required argument: 'edit'"):
        read("pairs", path, text="t")
    with pytest.raises(ValueError, match=r"format 'zsre': missing a required argument: 'path'"):
        read("zsre")


def test_own_records_come_back_equal(tmp_path):
    record = EditRecord(
        "ü-1",
        (EditRequest("p", "t", "p", "text", "old"), EditRequest(text="free")),
        rephrases=(Query("q", ("t", "alias")),),
        locality={"nq": (Query("l", ("a",)),)},
        portability={"one_hop": (Query("h", ("b",)),)},
        multi_hop=(Query("", ("c",)),),
        domain="P1",
    )
    path = tmp_path / "own.jsonl"
    path.write_text(record.to_json() + "\n" + record.to_json() + "\n", encoding="utf-8")
    assert list(read("records", path)) == [record, record]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rephrases": [{"prompt": "q", "answers": "Paris"}]}, "field 'answers' of a query must be a list of texts"),
        ({"locality": []}, "must be objects of kinds"),
        ({"requests": []}, "has no edit request"),
        ({"requests": [{"promt": "p"}]}, "promt"),
    ],
)
def test_own_records_that_are_malformed(write, change, reason):
    good = {"id": "1", "requests": [{"text": "t"}], "rephrases": [], "locality": {}, "portability": {}, "multi_hop": []}
    row = good | {"domain": None}
    assert [r.id for r in read("records", write([row]))] == ["1"]
    with pytest.raises(MalformedRecord, match=reason):
        list(read("records", write([row | change])))
    with pytest.raises(MalformedRecord, match="field 'domain' is missing"):
        list(read("records", write([good])))
