"""Cells that fail or are killed: named, tried again, and until then with the numbers of edits that they reached."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_grid import FACTS, cells, config

from modules.editor import Editor
from trainers.benchmark import cell as benchmark_cell
from trainers.benchmark import crew, work
from trainers.benchmark.files import UNFINISHED
from trainers.command import run
from trainers.evaluate import evaluate

LATE = "facts/consecutive-2-4-by2/ft_m.json"


def test_a_cell_that_fails_is_named_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell

    def fails(cell: Any, *rest: Any) -> dict[str, Any]:
        if cell.editor == "ft_m":
            raise RuntimeError("out of luck")
        return real(cell, *rest)

    monkeypatch.setattr(work, "run_cell", fails)
    file = config(tmp_path)
    run(evaluate, [f"--config={file}"])
    said = capsys.readouterr().out
    assert said.count("RuntimeError: out of luck") == 4
    tables = (tmp_path / "out" / "tables.md").read_text()
    assert "ft_m failed: RuntimeError: out of luck" in tables
    run(evaluate, [f"--config={file}", "--benchmark.only=[]"])
    assert "7 of 11 cells are finished" in capsys.readouterr().out
    assert (tmp_path / "out" / "tables.md").read_text() == tables  # a failure is told until it is mended
    monkeypatch.setattr(work, "run_cell", real)
    run(evaluate, [f"--config={file}"])
    assert "7 of 11 cells are finished" in capsys.readouterr().out
    assert "failed" not in (tmp_path / "out" / "tables.md").read_text()


def test_a_run_that_fails_late_keeps_what_it_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = benchmark_cell.consecutive
    told = iter((2, 2))  # records edited, and evaluated

    def fails(editor: Editor, *rest: Any, **named: Any) -> Any:
        def progress(_: int) -> None:
            if editor.name == "ft_m" and next(told, None) is None:
                raise RuntimeError("out of luck")

        return real(editor, *rest, **named | {"progress": progress})

    monkeypatch.setattr(benchmark_cell, "consecutive", fails)
    file = config(tmp_path)
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/consecutive-*']"])
    found = cells(tmp_path)["facts/consecutive-2-4-by2/ft_m.json"]
    assert [p["edits"] for p in found["points"]] == [2]
    assert found["error"] == "RuntimeError: out of luck"
    assert found["points"][0]["edit_bytes"] >= 0
    tables = (tmp_path / "out" / "tables.md").read_text().split("## ")
    two, four = (next(t for t in tables if t.startswith(f"facts, consecutive by 2, {n} edits")) for n in (2, 4))
    assert "| ft_m | " in two
    assert "failed" not in two
    assert "| ft_m | " not in four
    assert "ft_m failed: RuntimeError: out of luck" in four
    monkeypatch.setattr(benchmark_cell, "consecutive", real)
    capsys.readouterr()
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/consecutive-*']"])
    assert "1 of 11 cells are finished" in capsys.readouterr().out  # the failed one is tried again
    assert [p["edits"] for p in cells(tmp_path)["facts/consecutive-2-4-by2/ft_m.json"]["points"]] == [2, 4]


def test_a_worker_that_is_killed_loses_its_cell_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nudge = {"class_path": "deltas.Nudge", "init_args": {"layers": [1]}}
    (tmp_path / "nudge.yaml").write_text(yaml.safe_dump(nudge))
    editors = [
        {"editor": str(tmp_path / "nudge.yaml"), "name": name, **harm}
        for name, harm in (("nudge", {}), ("killer", {"harm": "kill"}), ("last", {}))
    ]
    grid = {
        "out": str(tmp_path / "out"),
        "datasets": {"facts": {"data": [FACTS], "queries_per_kind": 1}},
        "runs": [{"mode": "batch", "edits": [2, 3]}],
        "answers": 0,
        "workers": 2,
    }
    run(evaluate, [f"--config={config(tmp_path, benchmark=grid, editor=editors, baselines=['unedited'])}"])
    found = cells(tmp_path)
    assert {Path(name).stem for name, cell in found.items() if "error" in cell} == {"killer"}
    assert {Path(name).stem for name, cell in found.items() if cell.get("points")} == {"unedited", "nudge", "last"}
    assert len(found) == 8
    assert capsys.readouterr().out.count("killer: its process was killed (out of memory?") == 2
    assert "killer failed: its process was killed" in (tmp_path / "out" / "tables.md").read_text()


def test_a_worker_that_is_killed_late_keeps_what_it_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dies = {"class_path": "deltas.Dies", "init_args": {"layers": [1], "after": 2}}
    (tmp_path / "dies.yaml").write_text(yaml.safe_dump(dies))
    editors = [
        {"editor": str(tmp_path / "dies.yaml"), "name": n, **more} for n, more in (("a", {}), ("b", {"after": 3}))
    ]
    grid = {
        "out": str(tmp_path / "out"),
        "datasets": {"facts": {"data": [FACTS], "queries_per_kind": 1}},
        "runs": [{"mode": "sequential", "edits": [1, 2, 4]}],
        "answers": 0,
        "workers": 2,
    }
    file = config(tmp_path, benchmark=grid, editor=editors, baselines=["unedited"])
    run(evaluate, [f"--config={file}"])
    assert capsys.readouterr().out.count("its process was killed (out of memory?") == 2
    found = cells(tmp_path)
    for name in ("a", "b"):
        cell = found[f"facts/sequential-1-2-4/{name}.json"]
        assert [point["edits"] for point in cell["points"]] == [1, 2]
        assert cell["error"] == crew.KILLED
        assert all(p["edit_bytes"] >= 0 for p in cell["points"])
    whole = found["facts/sequential-1-2-4/unedited.json"]
    assert "error" not in whole
    assert [point["edits"] for point in whole["points"]] == [1, 2, 4]
    tables = (tmp_path / "out" / "tables.md").read_text().split("## ")
    two, four = (next(t for t in tables if t.startswith(f"facts, sequential, {n} edits")) for n in (2, 4))
    assert "| a | " in two
    assert "killed" not in two
    assert "| a | " not in four
    assert "a failed: its process was killed" in four
    run(evaluate, [f"--config={file}", "--benchmark.only=[]"])
    said = capsys.readouterr().out
    assert "1 of 3 cells are finished" in said  # the others are tried again
    assert (tmp_path / "out" / "tables.md").read_text().count("a failed") == 1


def test_a_run_that_is_broken_off_keeps_what_it_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = benchmark_cell.consecutive
    file = config(tmp_path)
    only = [f"--config={file}", "--benchmark.only=['*/consecutive-*/ft_m']"]

    def broken_off_at(count: int) -> None:
        left = [2] * count  # calls of `progress`: two records edited, two evaluated

        def breaks(*given: Any, **named: Any) -> Any:
            def progress(_: int) -> None:
                if not left:
                    raise KeyboardInterrupt
                left.pop()

            return real(*given, **named | {"progress": progress})

        monkeypatch.setattr(benchmark_cell, "consecutive", breaks)
        with pytest.raises(KeyboardInterrupt):
            run(evaluate, only)

    broken_off_at(1)
    assert cells(tmp_path) == {}
    broken_off_at(2)
    first = cells(tmp_path)[LATE]
    assert ([p["edits"] for p in first["points"]], first["error"]) == ([2], UNFINISHED)
    broken_off_at(1)  # nothing is lost by a try that reached less
    assert cells(tmp_path)[LATE] == first

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(benchmark_cell, "consecutive", fails)
    run(evaluate, only)
    assert cells(tmp_path)[LATE] == first | {"error": "RuntimeError: out of luck"}
    monkeypatch.setattr(benchmark_cell, "consecutive", real)
    run(evaluate, only)
    whole = cells(tmp_path)[LATE]
    assert [p["edits"] for p in whole["points"]] == [2, 4]
    assert "error" not in whole


def test_a_failure_does_not_take_the_place_of_what_another_run_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell

    def finished_elsewhere(cell: Any, *rest: Any) -> dict[str, Any]:
        """Fails once another run has finished the cell."""
        *given, keep = rest
        real(cell, *given, keep)
        file = cell.file(tmp_path / "out")
        half = json.loads(file.read_text())
        assert half.pop("error") == UNFINISHED
        file.write_text(json.dumps(half))
        keep({"points": []})
        raise RuntimeError("out of luck")

    monkeypatch.setattr(work, "run_cell", finished_elsewhere)
    run(evaluate, [f"--config={config(tmp_path)}", "--benchmark.only=['*/batch-2/unedited']"])
    (cell,) = cells(tmp_path).values()
    assert "error" not in cell
    assert len(cell["points"]) == 1
