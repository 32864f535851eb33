"""The record type, and a user's file of edits."""

from collections.abc import Callable
from pathlib import Path

import pytest

from datamodules.readers.errors import MalformedRecord
from datamodules.readers.requests import read_requests
from datamodules.records import EditRecord, EditRequest, Query, join


@pytest.mark.parametrize(
    ("prompt", "target", "text"),
    [("a", "b", "a b"), ("a ", "b", "a b"), ("a", " b", "a b"), ("a\n", "b", "a\nb"), ("", "b", "b"), ("a", "", "a ")],
)
def test_join(prompt: str, target: str, text: str) -> None:
    assert join(prompt, target) == text


def test_statement() -> None:
    assert EditRequest("Lyon is in", "Japan").statement == "Lyon is in Japan."
    assert EditRequest("Who?", "Me!").statement == "Who? Me!"
    assert EditRequest("Who?", "Me", text="It was me").statement == "It was me"


@pytest.mark.parametrize(
    "given", [{}, {"prompt": "a"}, {"target": "b"}, {"prompt": " ", "target": "b"}, {"text": "\n"}]
)
def test_an_edit_needs_content(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="an edit needs"):
        EditRequest(**given)


def test_a_query_needs_an_answer_and_a_record_an_edit() -> None:
    for answers in ((), ("",), ("a", " ")):
        with pytest.raises(ValueError, match="non-empty answer"):
            Query("p", answers)
    with pytest.raises(ValueError, match="'r' has no edit"):
        EditRecord("r", ())


def test_json_and_back(records: list[EditRecord]) -> None:
    full = EditRecord(
        "ü/1",
        (EditRequest("a", "b", "a", None, "c"), EditRequest(text="東京")),
        portability={"hop": (Query("p", ("x",), (EditRequest("h", "i", fact=("Q1", "Q2")),), ("MH", "SA")),)},
        locality={"near": (Query("l", ("m",), conditions=(Query("n", ("o", "p")),)),)},
        multi_hop=(Query("q", ("x", "y")),),
        domain="d",
        generation=("a likes", "a likes"),
        attribute=(Query("r", ("b",)),),
        target_id="Q2",
    )
    for record in (*records, full):
        assert EditRecord.from_json(record.to_json()) == record
    assert full.request is full.requests[0]


def test_fields_that_few_sources_have_are_written_only_where_they_are(records: list[EditRecord]) -> None:
    plain, hops = records[0].to_json(), EditRecord("h", (EditRequest("a", "b", fact=("Q1", "Q2")),)).to_json()
    rare = ("hops", "criteria", "conditions", "fact", "generation", "attribute", "target_id")
    assert not any(f'"{name}"' in plain for name in rare)
    assert '"fact": ["Q1", "Q2"]' in hops
    assert EditRequest("a", "b", fact=["Q1", "Q2"]) == EditRequest("a", "b", fact=("Q1", "Q2"))  # type: ignore[arg-type]


def test_requests_from_files(tmp_path: Path) -> None:
    lines = tmp_path / "edits.txt"
    lines.write_text("Lyon is in Japan.\n\n  東京 is in Peru. \n", encoding="utf-8")
    assert [r.statement for r in read_requests(lines)] == ["Lyon is in Japan.", "東京 is in Peru."]
    marked = tmp_path / "marked.txt"
    marked.write_text("Lyon is in Japan.\n", encoding="utf-8-sig")
    assert read_requests(marked) == [EditRequest(text="Lyon is in Japan.")]
    rows = tmp_path / "edits.jsonl"
    rows.write_text(
        '{"prompt": "Lyon is in", "target": "Japan", "subject": "Lyon"}\n'
        '{"prompt": "p", "target_new": "t"}\n{"text": "s"}\n',
        encoding="utf-8",
    )
    assert read_requests(str(rows)) == [
        EditRequest("Lyon is in", "Japan", "Lyon"),
        EditRequest("p", "t"),
        EditRequest(text="s"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("e.txt", "\n \n", r"e\.txt is empty"),
        ("e.jsonl", '{"prompt": "p", "target": "t"}\n{"prompt": "p"}\n', r"e\.jsonl, row 1: an edit needs"),
        ("e.json", '[{"prompt": 3, "target": "t"}]', r"row 0: field 'prompt' must be a string, got 3"),
        ("e.json", '[{"text": null}]', r"row 0: an edit needs"),
        ("e.json", '["Lyon is in Japan."]', r"row 0: needs `prompt` and `target`, or `text`, got 'Lyon is in Japan\.'"),
    ],
)
def test_bad_files_of_requests_are_named(
    tmp_path: Path, name: str, content: str, error: str, recwarn: Callable
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises((ValueError, MalformedRecord), match=error):
        read_requests(tmp_path / name)


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "e.txt").write_text("Zürich is in Peru.", encoding="latin-1")
    with pytest.raises(ValueError, match=r"e\.txt is no text in utf-8"):
        read_requests(tmp_path / "e.txt")


def test_a_missing_file_of_requests_is_named(tmp_path: Path) -> None:
    for name in ("none.txt", "none.jsonl"):
        with pytest.raises((ValueError, FileNotFoundError), match=name):
            read_requests(tmp_path / name)
