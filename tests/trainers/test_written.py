"""Files are written whole or not at all."""

import json
from pathlib import Path

import pytest

from trainers.written import check_file, write_json


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"meta": {"a": 1}})
    with pytest.raises(TypeError):
        write_json(path, {"meta": object()})
    assert json.loads(path.read_text()) == {"meta": {"a": 1}}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_numbers_that_are_none_are_written_as_null_and_told(tmp_path: Path) -> None:
    path, norms = tmp_path / "r.json", {"unedited": 1.5, "edited": float("inf")}
    with pytest.warns(
        UserWarning, match=r"r\.json: null stands for 3 numbers .*, the first is curves/a/0/norms/edited"
    ):
        write_json(path, {"curves": {"a": [{"norms": norms}]}, "ci": (float("nan"), float("-inf"), 2), "name": "nan"})
    assert json.loads(path.read_text()) == {
        "curves": {"a": [{"norms": {"unedited": 1.5, "edited": None}}]},
        "ci": [None, None, 2],
        "name": "nan",
    }
    assert norms["edited"] == float("inf")  # what is written is a copy


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "r.json"
    write_json(path, {"meta": 1})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"meta": 2})
    assert json.loads(path.read_text()) == {"meta": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .* is a folder; give a file in it, such as .*results\.json"):
        check_file(tmp_path, "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .* cannot be written: .*; give another file"):
        check_file(tmp_path / "file" / "results.json", "--out")
    check_file(tmp_path / "new" / "results.json", "--out")
    assert list((tmp_path / "new").iterdir()) == []
