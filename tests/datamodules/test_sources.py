"""Sources: files to one Arrow data set, its cache, its mixture and its errors."""

import gzip
import importlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from datamodules.files import hashes, sought
from datamodules.records import EditRecord, EditRequest
from datamodules.schedule import Place
from datamodules.sources import RecordDataset, Source, keep, load
from datamodules.texts import identity, read_texts


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def record(i: int, name: str = "r") -> EditRecord:
    return EditRecord(f"{name}{i}", (EditRequest(f"The capital of {i} is", f"City {i}", f"{i}"),))


def write(path: Path, count: int, name: str = "r") -> str:
    path.write_text("\n".join(record(i, name).to_json() for i in range(count)))
    return str(path)


def ids(data: RecordDataset) -> list[str]:
    return [r.id for r in data.records(range(len(data)))]


def arrow_files(folder: Path) -> set[Path]:
    return set(folder.rglob("*.arrow"))


def test_records_come_back_as_they_were_and_as_slots(tmp_path: Path) -> None:
    data = load([Source("records", write(tmp_path / "a.jsonl", 5))], str(tmp_path / "cache"))
    assert data.record(3) == record(3)
    places = [Place(4, 0, 7), Place(1, 1, 8)]
    assert data.__getitems__(places) == [data[p] for p in places]
    assert data[places[0]] == (record(4), 0, 7)


def test_sources_follow_each_other(tmp_path: Path) -> None:
    sources = [
        Source("records", write(tmp_path / "a.jsonl", 3, "a"), weight=1),
        Source("records", write(tmp_path / "b.jsonl", 4, "b"), weight=2, limit=2),
    ]
    data = load(sources, str(tmp_path / "cache"))
    assert ids(data) == ["a0", "a1", "a2", "b0", "b1"]
    assert (data.lengths, data.weights) == ([3, 2], [1, 2])


def test_a_sample_is_drawn_from_the_whole_source_by_its_seed(tmp_path: Path) -> None:
    """Few-shot augmentation: so many records of each further set, not its first ones."""
    cache, a, b = str(tmp_path / "cache"), write(tmp_path / "a.jsonl", 200, "a"), write(tmp_path / "b.jsonl", 5, "b")

    def drawn(sample: int | None, **more: int) -> list[str]:
        return ids(load([Source("records", a, sample=sample, **more)], cache))

    some = drawn(20)
    assert some == drawn(20)
    assert len(set(some)) == 20
    assert max(int(i[1:]) for i in some) > 100
    assert set(drawn(20, seed=1)) != set(some) < set(drawn(None))
    assert len(drawn(500)) == 200
    assert set(drawn(20, limit=30)) < {f"a{i}" for i in range(30)}
    both = load([Source("records", b), Source("records", a, sample=20)], cache)
    assert (both.lengths, ids(both)[5:]) == ([5, 20], some)
    assert keep(both, lambda r: r.id in some[:3], "train").lengths == [0, 3]
    with pytest.raises(ValueError, match="sample must be at least 1"):
        Source("facts", sample=0)


def test_one_file_is_split_by_skip_and_limit(tmp_path: Path) -> None:
    """Edits and demonstrations of one file, none of them both."""
    cache, a = str(tmp_path / "cache"), write(tmp_path / "a.jsonl", 10)
    first, then, rest = (
        ids(load([Source("records", a, **where)], cache))
        for where in ({"limit": 4}, {"skip": 4, "limit": 4}, {"skip": 8})
    )
    assert [first, then, rest] == [[f"r{i}" for i in part] for part in (range(4), range(4, 8), range(8, 10))]
    assert set(ids(load([Source("records", a, skip=5, sample=3)], cache))) < {f"r{i}" for i in range(5, 10)}
    with pytest.raises(ValueError, match=r"no records; check its options: .*skip: 10"):
        load([Source("records", a, skip=10)], cache)
    with pytest.raises(ValueError, match="skip must not be negative, got -1"):
        Source("facts", skip=-1)


def test_files_are_found_packed_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_DATA", str(tmp_path))
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl.gz").write_bytes(b"")
    assert Source("records", "a.jsonl.gz").located() == (tmp_path / "a.jsonl").resolve()
    assert Source("records", "b.jsonl").located() == (tmp_path / "b.jsonl.gz").resolve()
    assert list(read_texts("b.jsonl")) == []
    assert sought(".") == Path.cwd()
    assert sought("c.jsonl") is None
    assert identity("b.jsonl.gz") == identity(str(tmp_path / "b.jsonl.gz")) != identity("owner/name")
    with pytest.raises(FileNotFoundError, match=r"no file c\.jsonl\.gz"):
        Source("records", "c.jsonl.gz").located()


def test_cache_is_used_again_and_renewed_when_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "a.jsonl", tmp_path / "cache"
    source = Source("records", write(path, 3))
    load([source], str(cache))
    first = arrow_files(cache)
    assert len(first) == 1
    written = next(iter(first)).stat().st_mtime_ns
    assert ids(load([source], str(cache))) == ["r0", "r1", "r2"]
    assert arrow_files(cache) == first
    assert next(iter(first)).stat().st_mtime_ns == written

    stat = path.stat()
    write(path, 3, "s")  # as long as before, so that the time alone tells
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert ids(load([source], str(cache))) == ["s0", "s1", "s2"]
    assert ids(load([Source("records", str(path), limit=1)], str(cache))) == ["s0"]


def test_the_filter_is_told_and_cached(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = tmp_path / "cache"
    files = [Source("records", write(tmp_path / f"{n}.jsonl", 6, n)) for n in "ab"]
    data = load(files, str(cache))
    with caplog.at_level("INFO"):
        kept = keep(data, short, "train")
    assert ids(kept) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert kept.lengths == [3, 3]
    assert "left out 6 of 12 records longer than the limits (train)" in caplog.text
    before = arrow_files(cache)
    assert ids(keep(load(files, str(cache)), short, "train")) == ids(kept)
    assert arrow_files(cache) == before
    with pytest.raises(ValueError, match=r"all 12 records are longer than the limits \(val\)"):
        keep(data, lambda r: False, "val")


def short(record: EditRecord) -> bool:
    return int(record.id[1:]) < 3


def test_a_filter_whose_code_changed_is_run_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself the cache knows a collator by its name and its settings alone."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two texts of one length and second
    data = load([Source("records", write(tmp_path / "a.jsonl", 6))], str(tmp_path / "cache"))
    for count in (2, 4):
        code = f"class Collator:\n    def fits(self, record): return int(record.id[1:]) < {count}"
        (tmp_path / "of_fits.py").write_text(code)
        module = importlib.reload(importlib.import_module("of_fits"))
        assert len(keep(data, module.Collator().fits, "train")) == count
    monkeypatch.delitem(sys.modules, "of_fits")


def test_a_relative_path_is_looked_for_in_two_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, data = tmp_path / "here", tmp_path / "data"
    here.mkdir()
    data.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("PALIMPSEST_DATA", raising=False)
    source = Source("records", "a.jsonl")
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl .*here.*PALIMPSEST_DATA.* is not set"):
        source.located()
    monkeypatch.setenv("PALIMPSEST_DATA", str(data))
    with pytest.raises(FileNotFoundError, match=r"a\.jsonl .*here and in .*data"):
        source.located()
    write(data / "a.jsonl", 1)
    assert source.located() == data / "a.jsonl"
    write(here / "a.jsonl", 1)
    assert source.located() == here / "a.jsonl"
    assert Source("hub", "some/name").located() is None


def test_a_malformed_record_is_the_readers_error_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.loads(record(i).to_json()) for i in range(3)]
    rows[1]["requests"] = []
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"a\.jsonl, record 1 .*has no edit request"):
        load([Source("records", str(path))], str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        data = load([Source("records", str(path), on_error="skip")], str(tmp_path / "cache"))
    assert ids(data) == ["r0", "r2"]


@pytest.mark.parametrize(("limit", "kept"), [(None, ["r0", "r2", "r4"]), (2, ["r0", "r2"]), (1, ["r0"])])
def test_what_was_skipped_is_told_at_each_load(tmp_path: Path, limit: int | None, kept: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    rows = [json.loads(record(i).to_json()) for i in range(5)]
    rows[1]["requests"] = rows[3]["requests"] = []
    path.write_text("\n".join(map(json.dumps, rows)))
    source = Source("records", str(path), on_error="skip", limit=limit)
    wanted = {None: ["skipped 2 of 5"], 2: ["skipped 1 of 3"], 1: []}[limit]  # of those that were read
    for _ in range(2):  # the second time from the cache
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load([source], str(tmp_path / "cache"))
        said = [str(w.message) for w in caught if "skipped" in str(w.message)]
        assert [text[:14] for text in said] == wanted
        assert all("a.jsonl: first: record 1 (id r1): " in text for text in said)
        assert ids(data) == kept
        assert data.lengths == [len(kept)]
    same = replace(source, on_error="raise", options={"on_error": "skip"})
    assert ids(load([same], str(tmp_path / "cache"))) == kept
    with pytest.raises(ValueError, match="no records; check its options"):
        load([replace(source, skip=9)], str(tmp_path / "cache"))


def test_questions_left_out_are_told_at_each_load(tmp_path: Path) -> None:
    path = tmp_path / "scientific.json"
    path.write_text(json.dumps({"edits": ["Rub.", "Heat."], "test_inputs": [["Why?", "A", "B"], ["How?", "A"]]}))
    for _ in range(2):  # the second time from the cache
        with pytest.warns(UserWarning, match=r"scientific\.json: 1 of its questions left out as spoilt, the first: 't"):
            data = load([Source("dune", str(path))], str(tmp_path / "cache"))
        assert ids(data) == ["scientific-0", "scientific-1"]


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown format 'fact'; known formats: .*facts"):
        Source("fact")
    with pytest.raises(ValueError, match="limit must be at least 1"):
        Source("facts", limit=0)
    with pytest.raises(ValueError, match="weight must be positive"):
        Source("facts", weight=0)
    with pytest.raises(ValueError, match="no source is given"):
        load([])
    with pytest.raises(ValueError, match=r"every source a weight, or none; without a weight: zsre b\.json"):
        load([Source("facts", weight=1), Source("zsre", "b.json")])
    with pytest.raises(ValueError, match="unexpected keyword argument 'spilt'"):
        load([Source("facts", options={"spilt": "val"})], str(tmp_path / "cache"))


def test_files_are_known_again_by_what_they_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "folder").mkdir()
    named = {"text": "a.txt", "more": [{"path": "folder"}, "a" * 5000, "\0", 3, None], "none": "b.txt"}
    before = hashes(named)
    assert list(before) == ["a.txt"]
    with gzip.open("a.txt.gz", "wt") as file:
        file.write("one")
    (tmp_path / "a.txt").unlink()
    assert hashes(named) == before
    (tmp_path / "a.txt").write_text("two")
    assert hashes(named) != before
