"""A benchmark from the command line: every cell once, kept when it is asked for again, by one process or two."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_grid import FACTS, cells, config

from modules.backbone import BackboneConfig
from trainers import evaluate as evaluate_command
from trainers import workers
from trainers.benchmark import crew, work
from trainers.benchmark import run as benchmark_run
from trainers.command import run
from trainers.evaluate import evaluate
from trainers.result_cache import code
from trainers.workers import Specs, nth_device, spread


def grid(edits: list[int], **dataset: Any) -> dict[str, Any]:
    runs = [{"mode": "batch", "edits": edits}]
    return {"datasets": {"facts": {"data": [FACTS], **dataset}}, "runs": runs, "out": "nowhere/out"}


def test_some_cells_alone_are_run_and_the_finished_ones_tabulated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path)
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/unedited', 'facts/batch-*/ft_m']"])
    found = cells(tmp_path)
    assert set(found) == {
        *(f"facts/{r}/unedited.json" for r in ("single-2", "batch-2", "batch-4", "consecutive-2-4-by2")),
        "facts/batch-2/ft_m.json",
        "facts/batch-4/ft_m.json",
    }
    table = (tmp_path / "out" / "tables.md").read_text()
    drawn_of = found["facts/batch-4/unedited.json"]["records_available"]
    assert all(cell["data"] == "facts" for cell in found.values())
    assert table.count(f"The records are drawn of {drawn_of:,}.") == 5
    assert table.count("Not run yet: icl_right_edit.") == 2  # batches of 2 and 4
    assert table.count("Not run yet: icl_right_edit, ft_m.") == 1  # singles
    assert table.count("Not run yet: ft_m.") == 2  # after 2 and after 4 in batches; nothing is said of an upper bound
    monkeypatch.setattr(work, "run_cell", None)
    capsys.readouterr()
    run(evaluate, [f"--config={file}", "--benchmark.only=[]"])
    assert "6 of 11 cells are finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text() == table
    monkeypatch.setattr("trainers.evaluate.build", None)  # refused before anything is loaded
    with pytest.raises(SystemExit) as stopped:
        run(evaluate, [f"--config={file}", "--benchmark.only=[memit]"])
    said = "benchmark.only: no cell is called 'memit'; they are called as facts/single-2/unedited"
    assert said in str(stopped.value.code)
    assert all(cell["hardware"] and cell["date"].endswith("+00:00") for cell in found.values())


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    told = {k: v for k, v in result.items() if k not in ("command", "date", "hardware")}
    told["points"] = [{k: v for k, v in p.items() if not k.endswith(("_seconds", "_bytes"))} for p in result["points"]]
    return told


def test_a_grid_is_run_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = config(tmp_path)
    run(evaluate, [f"--config={file}"])
    found = cells(tmp_path)
    runs = ("single-2", "batch-2", "batch-4", "consecutive-2-4-by2")
    wanted = {f"facts/{r}/{e}.json" for r in runs for e in ("unedited", "icl_right_edit", "ft_m")}
    assert set(found) == wanted - {"facts/consecutive-2-4-by2/icl_right_edit.json"}
    together = found["facts/batch-4/ft_m.json"]["points"]
    assert [len(p["records"]) for p in together] == [4]
    assert found["facts/batch-4/ft_m.json"]["queries_per_kind"] == 1
    assert set(together[0]["records"][0]) >= {"case_id", "requested_rewrite", "pre", "post"}  # EasyEdit's shape
    after = found["facts/consecutive-2-4-by2/ft_m.json"]
    assert [p["edits"] for p in after["points"]] == [2, 4]
    assert after["points"][1]["norms"]
    answers = after["answers"]
    assert len({a["record"] for a in answers}) == 2
    assert {a["kind"].split("/")[0] for a in answers} >= {"rewrite", "rephrase", "locality", "portability"}
    assert any(a["before"] != a["after"] for a in answers)
    assert all(a["before"] == a["after"] for a in found["facts/batch-4/unedited.json"]["answers"])
    # the first two records of four are those of two
    ids = [[r["case_id"] for r in found[f"facts/batch-{n}/unedited.json"]["points"][0]["records"]] for n in (2, 4)]
    assert ids[0] == ids[1][:2]
    for name in ("results.csv", "tables.md", "tables.tex", "answers.html", "figures/facts-edits.png"):
        assert (tmp_path / "out" / name).stat().st_size > 200
    capsys.readouterr()

    def fail(*_: Any) -> None:
        raise AssertionError("a finished cell is run again")

    monkeypatch.setattr(work, "run_cell", fail)
    run(evaluate, [f"--config={file}"])
    said = capsys.readouterr().out
    assert "11 of 11 cells are finished" in said
    assert "other code" not in said + (tmp_path / "out" / "tables.md").read_text()
    assert all(cell["code"] == code() for cell in found.values())

    for editor, told in (("ft_m", {"code": "0123456789"}), ("unedited", {})):  # by other code, and from before
        path = tmp_path / "out" / "cells" / "facts" / "batch-4" / f"{editor}.json"
        cell = json.loads(path.read_text())
        del cell["code"]
        path.write_text(json.dumps(cell | told))
    run(evaluate, [f"--config={file}"])  # nothing is computed anew
    said = " ".join(capsys.readouterr().out.split())
    assert "2 of them were computed by other code than today's and are kept" in said
    table = (tmp_path / "out" / "tables.md").read_text()
    assert table.count("Computed by different code") == 1
    assert f"unedited (not told); icl_right_edit ({code()[:8]}); ft_m (01234567)." in table


def test_a_data_set_is_judged_by_its_own_protocol_in_every_mode(tmp_path: Path) -> None:
    facts = {"format": "facts_uniedit", "options": {"split": "test"}}
    grid = {
        "out": str(tmp_path / "out"),
        "datasets": {
            "plain": {"data": [FACTS], "queries_per_kind": 1},
            "top5": {"data": [facts], "protocol": "uniedit"},
        },
        "runs": [{"mode": "sequential", "edits": [1, 2]}, {"mode": "batch", "edits": [2]}],
        "answers": 0,
        "workers": 1,
    }
    run(evaluate, [f"--config={config(tmp_path, benchmark=grid, baselines=['icl'], editor=[])}"])
    found = cells(tmp_path)
    assert {cell["protocol"] for name, cell in found.items() if name.startswith("top5/")} == {"uniedit"}
    after, at_once = found["top5/sequential-1-2/icl.json"]["points"][1], found["top5/batch-2/icl.json"]["points"][0]
    assert after["metrics"] == at_once["metrics"]
    assert "generality/uniedit_top_5" in after["metrics"]
    assert after["settings"]["protocol"] == at_once["settings"]["protocol"] == "uniedit"
    assert "reliability/token_accuracy" in found["plain/sequential-1-2/icl.json"]["points"][1]["metrics"]


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    run(evaluate, [f"--config={config(tmp_path / 'one')}"])
    run(evaluate, [f"--config={config(tmp_path / 'two')}", "--benchmark.workers=2"])
    one, two = cells(tmp_path / "one"), cells(tmp_path / "two")
    assert set(one) == set(two)
    assert {n: without_times(c) for n, c in one.items()} == {n: without_times(c) for n, c in two.items()}


def test_each_cell_says_what_its_process_ran_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = work.Ended({"hardware": "a worker's", "points": []})
    monkeypatch.setattr(crew, "spread", lambda _, cells, *__, **___: ((c, there) for c in cells))
    monkeypatch.setattr(benchmark_run, "write_figures", lambda *_: None)
    run(evaluate, [f"--config={config(tmp_path)}", "--benchmark.workers=2"])
    assert {cell["hardware"] for cell in cells(tmp_path).values()} == {"a worker's"}


def test_workers_are_on_the_device_that_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [nth_device(n) for n in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [nth_device(n, "cpu") for n in range(2)] == ["cpu", "cpu"]
    assert nth_device(1, "cuda:3") == "cuda:3"
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(workers, "build", lambda _, device: (device, []))
    monkeypatch.setattr(workers, "_mine", {})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    for device in ("cuda:3", "cpu"):
        workers.prepare(Specs(None, ()), device, 1)
    assert chosen == [torch.device("cuda:3")]


def test_threads_are_shared_out_of_the_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Pool:
        def __init__(self, *given: Any) -> None:
            asked.append(given[3])
            raise RuntimeError("seen")

    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", Pool)
    specs = Specs(None, (), device="cpu")
    with pytest.raises(RuntimeError, match="seen"):
        next(spread(str, [1, 2], specs, 2))
    assert asked == [(specs, "cpu", 3)]


def test_workers_that_cannot_be_built_are_named(tmp_path: Path) -> None:
    nowhere = Specs(BackboneConfig("random:llama"), ("no such editor",))
    with pytest.raises(ValueError, match="no worker process can load the model and build the editors"):
        list(spread(str, [1, 2, 3], nowhere, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": [FACTS]}, "--data: a benchmark names its own data sets"),
        ({"protocol": "uniedit"}, "--protocol and its options: each of benchmark.datasets names its own"),
        ({"records": 5}, "--records 5 has no effect on a benchmark: leave it out, and set edits in benchmark.runs"),
        ({"pool_sizes": [1, 5]}, r"--pool_sizes \[1,5\] has no effect on a benchmark: .* a run {mode: batch, "),
        ({"singles": 5}, "--singles 5 has no effect on a benchmark: .* a run {mode: single, "),
        ({"queries_per_kind": 1}, "--queries_per_kind 1 has no effect .* set queries_per_kind in benchmark.datasets"),
        ({"asked": 1}, "--asked 1 has no effect on a benchmark: leave it out, and set asked in benchmark.runs"),
        ({"exact_match": False}, "--exact_match false has no effect .* set exact_match in benchmark.datasets"),
        ({"mode": "consecutive"}, "--mode consecutive has no effect on a benchmark: .* set mode in benchmark.runs"),
        ({"batch": 2}, "--batch 2 has no effect on a benchmark: .* set batch in benchmark.runs"),
        ({"checkpoints": [2]}, r"--checkpoints \[2\] has no effect on a benchmark: .* set edits in benchmark.runs"),
        ({"out": "x.json"}, "--out x.json has no effect on a benchmark: leave it out, and set benchmark.out"),
        ({"benchmark": grid([2], queries_per_kind=0)}, ".*queries_per_kind must be at least 1, or null to ask all"),
        ({"baselines": ["nothing"]}, "unknown baseline 'nothing'"),
        ({"device": "cuda:9"}, "--device cuda:9: this machine has"),
        ({"device": "gpu9"}, "--device 'gpu9' is none"),
        ({"benchmark": grid([2, 9999])}, r"benchmark\.datasets\.facts has \d+ records, a run needs 9999"),
        ({"benchmark": grid([2], protocol="dune")}, "--protocol dune: record .* which is no set of DUNE"),
        ({"benchmark": grid([2]) | {"out": __file__}}, r"benchmark\.out .* is a file; give another folder"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "build", None)  # no model may be loaded
    with pytest.raises(SystemExit, match=f"error: {message}"):
        run(evaluate, [f"--config={config(tmp_path, **change)}"])
    assert not (tmp_path / "out").exists()
