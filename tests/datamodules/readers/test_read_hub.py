"""The hub without a network: data sets saved to a folder, and a client that is stood in for."""

import json
from pathlib import Path

import pytest

from datamodules.readers import read
from datamodules.readers.auto import detected
from datamodules.readers.errors import DataError
from datamodules.readers.hub import hub_rows
from datamodules.sources import Source, described, load

datasets = pytest.importorskip("datasets")

# of two shapes, as one table holds them: what one record lacks is None
ZSRE = [
    {"src": "Who?", "alt": "A", "rephrase": "r", "loc": "nq question: l", "loc_ans": "g"},
    {"src": "What?", "alt": "B", "rephrase": "s", "portability": {"New Question": "q", "New Answer": "a"}},
]


@pytest.fixture
def saved(tmp_path):
    """A data set with one split, saved by `datasets`."""
    table = datasets.Dataset.from_list([{"portability": None, "loc": None, "loc_ans": None} | row for row in ZSRE])
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "some" / "zsre"))
    table.save_to_disk(str(tmp_path / "alone"))
    return tmp_path


def test_a_split_reads_as_the_file_does(saved, write):
    path = f"hub:{saved}/some/zsre:train"
    records = list(read("zsre", path))
    assert [r.id for r in records] == ["zsre:train-0", "zsre:train-1"]
    from_file = list(read("zsre", write(ZSRE)))
    assert [(r.requests, r.locality, r.portability) for r in records] == [
        (r.requests, r.locality, r.portability) for r in from_file
    ]
    assert detected(path) == "zsre"
    assert len(list(hub_rows(f"hub:{saved}/alone:train"))) == 2


def test_a_file_of_a_repository(saved, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    local = saved / "test_cf.json"
    local.write_text(json.dumps([{"prompt": "p", "target_new": "t"}]), encoding="utf-8")
    assert next(read("knowedit", f"hub:{saved}:test_cf.json")).id == "test_cf-0"
    seen = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: seen.append((a, k)) or str(local))
    (record,) = read("auto", "hub:owner/KnowEdit:benchmark/wiki/test_cf.json")
    assert (record.id, record.request.target) == ("test_cf-0", "t")
    assert set(map(str, seen)) == {
        "(('owner/KnowEdit', 'benchmark/wiki/test_cf.json'), {'repo_type': 'dataset', 'revision': None})"
    }


def test_a_revision_is_read_and_told(saved, monkeypatch):
    """What is kept as Arrow is of the commit that the hub's client last saw."""
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(saved / "hub"))
    refs = saved / "hub" / "datasets--owner--name" / "refs"
    refs.mkdir(parents=True)
    local, seen = saved / "a.json", []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: seen.append(k["revision"]) or str(local))
    main, tagged = (Source("knowedit", f"hub:owner/{name}:a.json") for name in ("name", "name@v1"))
    assert main.commit is None  # nothing was read yet, and there is no network
    (refs / "v1").write_text("1" * 40)
    for count, sha in ((1, "a" * 40), (2, "b" * 40)):
        (refs / "main").write_text(sha)
        local.write_text(json.dumps([{"prompt": f"p {i}", "target_new": "t"} for i in range(count)]), encoding="utf-8")
        assert len(load([main], cache_dir=str(saved / "cache"))) == count
        assert described([main, tagged]) == f"{main.name} at {sha}; {tagged.name} at {'1' * 40}"
    assert seen == [None, None]
    assert len(load([tagged], cache_dir=str(saved / "cache"))) == 2
    assert seen[2:] == ["v1"]
    of_a_table = {"subset": None, "split": "train", "edit": "e", "text": "t"}
    assert Source("hub", "owner/name", of_a_table | {"revision": "v1"}).commit == "1" * 40
    assert Source("hub", "owner/name", of_a_table | {"revision": "c" * 40}).commit == "c" * 40
    assert Source("hub", str(saved / "alone"), of_a_table).commit is None
    assert Source("facts").commit is None


def test_failures_name_the_data_set(saved, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fails(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
    with pytest.raises(DataError, match=r"cannot fetch a\.json of data set 'owner/name': no route"):
        read("zsre", "hub:owner/name:a.json")
    with pytest.raises(DataError, match=r"cannot load dataset .*split 'nosuch'"):
        read("zsre", f"hub:{saved}/some/zsre:nosuch")
    for wrong in ("hub:owner/name", "hub:a:b:c:d", "hub::train"):
        with pytest.raises(ValueError, match=rf"{wrong}: write hub:owner/name:split"):
            read("zsre", wrong)
    with pytest.raises(ValueError, match=r"a file has no subset; write hub:owner/name:path/of/the/file\.json"):
        read("zsre", "hub:owner/name:sub:a.json")
    with pytest.raises(ValueError, match="names a split, but this format is one JSON object"):
        read("dune", "hub:owner/name:train", subset="new_info")


def test_a_source_on_the_hub_is_no_local_file():
    assert Source("zsre", "hub:owner/name:train").located() is None
    assert not Path("hub:owner").exists()


@pytest.mark.parametrize(
    ("format", "path", "name", "options"),
    [
        ("knowedit", "hub:{}:rows.jsonl", "rows.jsonl", {}),
        ("knowedit", "hub:{}:train", "train.jsonl", {}),
        ("hub", "{}", "train.jsonl", {"subset": None, "split": "train", "edit": "target_new", "text": "prompt"}),
    ],
)
def test_a_local_folder_that_changed_is_read_anew(tmp_path, format, path, name, options):
    """Its rows are kept as Arrow, under what the folder's files are."""
    folder = tmp_path / "own"
    folder.mkdir()
    source = Source(format, path.format(folder), options=options)
    for count in (1, 2):
        rows = [{"prompt": f"p {i}", "target_new": "t"} for i in range(count)]
        (folder / name).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        assert len(load([source], cache_dir=str(tmp_path / "cache"))) == count
