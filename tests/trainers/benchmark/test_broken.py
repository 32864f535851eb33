"""After an error that ends all of a process's work on a GPU: the cell tells its own reason, and no other one fails."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_grid import FACTS, cells, config

from trainers.benchmark import work
from trainers.command import run
from trainers.evaluate import evaluate

REASON = "RuntimeError: CUDA error: an illegal memory access was encountered"


def grid(folder: Path, workers: int) -> Path:
    """Four editors with a cell each, of which the second breaks the process that it runs in."""
    (folder / "nudge.yaml").write_text(yaml.safe_dump({"class_path": "deltas.Breaks", "init_args": {"layers": [1]}}))
    harms = (("nudge", {}), ("breaker", {"harm": "context"}), ("last", {}), ("end", {}))
    benchmark = {
        "out": str(folder / "out"),
        "datasets": {"facts": {"data": [FACTS], "queries_per_kind": 1}},
        "runs": [{"mode": "batch", "edits": [2]}],
        "answers": 0,
        "workers": workers,
    }
    editors = [{"editor": str(folder / "nudge.yaml"), "name": name, **harm} for name, harm in harms]
    return config(folder, benchmark=benchmark, editor=editors, baselines=["unedited"])


@pytest.mark.parametrize("fails", [False, True])
def test_a_device_is_asked_whether_it_still_computes(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    asked: list[torch.device] = []

    def synchronize(device: torch.device) -> None:
        asked.append(device)
        if fails:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert work.usable(torch.device("cuda", 1)) is not fails
    assert work.usable(torch.device("cpu"))
    assert asked == [torch.device("cuda", 1)]


def test_a_worker_that_can_go_on_no_more_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(evaluate, [f"--config={grid(tmp_path, workers=2)}"])
    found = cells(tmp_path)
    assert {Path(name).stem: cell["error"] for name, cell in found.items() if "error" in cell} == {"breaker": REASON}
    assert len([cell for cell in found.values() if cell.get("points")]) == 4
    assert "not run" not in capsys.readouterr().out


def test_a_command_that_can_go_on_no_more_leaves_the_rest_to_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real: Any = work.run_cell

    def fails(cell: Any, *rest: Any) -> dict[str, Any]:
        if cell.editor == "breaker":
            raise RuntimeError(REASON.partition(": ")[2])
        return real(cell, *rest)

    monkeypatch.setattr(work, "run_cell", fails)
    monkeypatch.setattr(work, "usable", lambda _: False)
    run(evaluate, [f"--config={grid(tmp_path, workers=1)}"])
    assert "2 cells are not run: after that error this process can use the GPU no more" in capsys.readouterr().out
    found = {Path(name).stem: cell.get("error") for name, cell in cells(tmp_path).items()}
    assert found == {"unedited": None, "nudge": None, "breaker": REASON}
    assert "Not run yet: last, end." in (tmp_path / "out" / "tables.md").read_text()
