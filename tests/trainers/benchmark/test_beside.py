"""Two commands that run parts of one grid at once: no cell twice, and tables of both."""

from pathlib import Path
from typing import Any

import pytest
from small_grid import cells, config

from trainers.benchmark import work
from trainers.command import run
from trainers.evaluate import evaluate


def test_what_another_command_finishes_meanwhile_is_passed_over_and_in_the_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = work.run_cell
    file = config(tmp_path, baselines=["unedited"], editor=[])
    taken: list[str] = []

    def beside(cell: Any, *rest: Any) -> dict[str, Any]:
        taken.append(cell.place)
        if len(taken) == 1:
            run(evaluate, [f"--config={file}", "--benchmark.only=['*/single-2/*', '*/batch-4/*']"])
            capsys.readouterr()
        return real(cell, *rest)

    monkeypatch.setattr(work, "run_cell", beside)
    run(evaluate, [f"--config={file}", "--benchmark.only=['*/batch-*']"])
    assert sorted(taken) == ["facts/batch-2/unedited", "facts/batch-4/unedited", "facts/single-2/unedited"]
    assert "facts, batch 4, unedited: finished meanwhile, by another command" in capsys.readouterr().out
    assert all("error" not in cell for cell in cells(tmp_path).values())
    titles = [line for line in (tmp_path / "out" / "tables.md").read_text().splitlines() if line.startswith("## ")]
    titles = [title for title in titles if not title.endswith("by kind")]
    assert titles == ["## facts, single, single edits", "## facts, batch, 2 edits", "## facts, batch, 4 edits"]
