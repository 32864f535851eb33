"""A benchmark in a folder that has finished cells of another setting: refused in words, and nothing written over."""

import json
from pathlib import Path
from typing import Any

import pytest
from small_grid import cells, config

from trainers.benchmark import work
from trainers.benchmark.files import UNFINISHED
from trainers.benchmark.settings import differences, of_other_settings
from trainers.command import run
from trainers.evaluate import evaluate

TOLD: dict[str, Any] = {
    "editor": "memit",
    "protocol": "default",
    "judging": {"protocol": "default", "exact_match": False},
    "queries_per_kind": None,
    "seed": 0,
    "facts": {"class_path": "MEMIT", "init_args": {"layers": [1], "weight": 15}},
    "files": {"text.txt": "1a"},
    "backbone": {"source": "here", "dtype": "float32", "revision": None, "overrides": {}, "liger": False},
    "weights": "0a",
    "records_hash": "0b",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1, "queries_per_kind": 2}, ["queries_per_kind is null there and 2 now", "seed is 0 there and 1 now"]),
        ({"judging": TOLD["judging"] | {"exact_match": True}}, ["judging.exact_match is False there and True now"]),
        (
            {"facts": {"class_path": "MEMIT", "init_args": {"layers": [1, 2], "chunk": 8}}},
            [
                "facts.init_args.layers is [1] there and [1, 2] now",
                "facts.init_args.weight is 15 there and absent now",
                "facts.init_args.chunk is absent there and 8 now",
            ],
        ),
        ({"files": {"text.txt": "2b"}}, ["the content of text.txt differs"]),
        (
            {"weights": "1a", "backbone": TOLD["backbone"] | {"dtype": "bfloat16"}},
            ["the model's weights differ", "backbone.dtype is float32 there and bfloat16 now"],
        ),
        ({"backbone": TOLD["backbone"] | {"source": "a copy", "overrides": {"x": 1}}, "weights": "0a"}, None),
        ({"records_hash": "2b"}, ["the records and what is asked of them differ"]),
        ({"liger": True}, ["it differs in what its file does not tell: records, weights, options of the protocol"]),
    ],
)
def test_what_differs_is_told_in_words(change: dict[str, Any], words: list[str] | None) -> None:
    found = differences(TOLD, TOLD | change)
    words = ["backbone.overrides.x is absent there and 1 now"] if words is None else words
    assert len(found) == len(words)
    assert all(text.startswith(start) for text, start in zip(found, words, strict=True))


def test_files_of_before_are_compared_by_what_they_tell() -> None:
    before = {name: TOLD[name] for name in ("editor", "seed", "backbone")}
    assert differences(before, TOLD | {"seed": 3}) == ["seed is 0 there and 3 now"]


def test_differences_of_many_cells_are_counted() -> None:
    apart = {
        f"facts/batch-{n}/memit": ["seed is 0 there and 1 now", *["the records differ"] * (n == 2)] for n in (1, 2)
    }
    said = of_other_settings(apart, Path("out"))
    assert said == (
        "benchmark.out out: 2 finished cells, such as cells/facts/batch-1/memit.json, are of another setting: "
        "seed is 0 there and 1 now; the records differ (1 of them)"
    )
    many = of_other_settings({"x": [f"{n} differ" for n in range(9)]}, Path("out"))
    assert many.startswith("benchmark.out out: cells/x.json is of another setting: 0 differ; ")
    assert many.endswith("; 5 differ; and 3 more")


def test_finished_cells_of_another_setting_are_not_written_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path, baselines=["unedited"], editor=[])
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/batch-2/*', '*/single-2/*']"])
    before = cells(tmp_path)
    table = (tmp_path / "out" / "tables.md").read_text()
    half = tmp_path / "out" / "cells" / "facts" / "single-2" / "unedited.json"
    half.write_text(json.dumps(before["facts/single-2/unedited.json"] | {"error": UNFINISHED}))
    monkeypatch.setattr(work, "run_cell", None)
    with pytest.raises(SystemExit) as stopped:
        run(evaluate, [f"--config={file}", "--seed=1"])
    said = str(stopped.value.code)
    assert "cells/facts/batch-2/unedited.json is of another setting: seed is 0 there and 1 now; the records and" in said
    assert (
        "Give another benchmark.out, remove the files to compute them anew, or leave them out by benchmark.only" in said
    )
    assert (tmp_path / "out" / "tables.md").read_text() == table  # nothing was written
    monkeypatch.undo()
    capsys.readouterr()
    run(evaluate, [f"--config={file}", "--seed=1", "--benchmark.only=['*/single-2/*', '*/batch-4/*']"])
    told = " ".join(capsys.readouterr().out.split())
    assert "not to be run, so left as found, and in no table" in told
    found = cells(tmp_path)
    assert found["facts/batch-2/unedited.json"] == before["facts/batch-2/unedited.json"]
    assert found["facts/single-2/unedited.json"]["seed"] == 1  # what is not finished does not stand in the way
    assert "error" not in found["facts/single-2/unedited.json"]
    assert "2 edits" not in (tmp_path / "out" / "tables.md").read_text()


def test_another_batch_size_keeps_what_is_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = config(tmp_path, baselines=["unedited"], editor=[])
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/batch-2/*']"])
    capsys.readouterr()
    run(evaluate, [f"--config={file}", "--batch_size=1", "--benchmark.only=['*/batch-*']"])
    assert "1 of 4 cells are finished" in capsys.readouterr().out
    assert [cell["batch_size"] for name, cell in cells(tmp_path).items() if "batch-" in name] == [32, 1]


def test_a_cell_that_another_setting_finishes_meanwhile_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell
    file = config(tmp_path, baselines=["unedited"], editor=[])

    def beside(cell: Any, *rest: Any) -> dict[str, Any]:
        """As another command of another seed ends both cells while this one is at the first."""
        monkeypatch.setattr(work, "run_cell", real)
        run(evaluate, [f"--config={file}", "--seed=1", "--benchmark.only=['*/batch-*']"])
        capsys.readouterr()
        return real(cell, *rest)

    monkeypatch.setattr(work, "run_cell", beside)
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/batch-*']"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("not kept: its file is by now a finished one of another setting") == 2
    assert [cell["seed"] for cell in cells(tmp_path).values()] == [1, 1]
