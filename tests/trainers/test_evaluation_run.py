"""An evaluation: its pools, what it refuses, and what happens when an editor fails."""

import json
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import RECORDS, Failing, chosen, run
from printed_tables import rows

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Editor
from modules.training_free.icl import InContext, Unedited
from trainers import evaluation_run
from trainers.evaluation_run import run_evaluation
from trainers.protocols import Judging
from trainers.report import failures


@pytest.fixture
def backbone(tiny: Any) -> Backbone:
    return tiny()


def test_failing_editor_is_marked_and_the_run_goes_on(backbone: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    report, screen = run(backbone, out, [Failing(), Unedited()])
    assert failures(report) == [("failing", 4, "ValueError: at most two edits")]
    assert json.loads(out.read_text())["aggregate"]["failing"]["4"] == {"error": "ValueError: at most two edits"}
    assert "value" in report["aggregate"]["failing"]["2"]["reliability/token_accuracy"]
    assert "4" not in report["records"]["failing"]
    assert report["records"]["unedited"]["4"]
    assert "failing failed with pools of 4: ValueError: at most two edits" in screen
    assert ["failing", "4", "-", "-", "-", "-"] in rows(report)


def test_a_stopped_run_keeps_what_it_has(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real = tmp_path / "results.json", evaluation_run.evaluate_pools

    def stopped(judge: object, editor: Editor, *args: object, **kwargs: object) -> object:
        if editor.name == "icl":
            raise KeyboardInterrupt
        return real(judge, editor, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation_run, "evaluate_pools", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, out, [Unedited(), InContext()])
    assert set(json.loads(out.read_text())["aggregate"]["unedited"]) == {"4"}


def test_pool_sizes_above_the_records_become_their_number(
    backbone: Backbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    report = run_evaluation(
        chosen(Unedited()), backbone, RECORDS, [4, 8, 100], Judging(), tmp_path / "r.json", progress=False
    )
    assert list(report["aggregate"]["unedited"]) == ["4"]
    assert "there are 4 records" in caplog.text


def test_single_edits_are_made_for_fewer_records(backbone: Backbone, tmp_path: Path) -> None:
    report = run_evaluation(chosen(InContext()), backbone, RECORDS, [4, 1], Judging(), tmp_path / "r.json", singles=3)
    assert {size: len(found) for size, found in report["records"]["icl"].items()} == {"1": 3, "4": 4}


@pytest.mark.parametrize(
    ("editors", "records", "sizes", "message"),
    [
        ([], RECORDS, [1], "0 editors"),
        ([Unedited()], [], [1], "0 records"),
        ([Unedited()], RECORDS, [], "pool sizes"),
        ([Unedited()], RECORDS, [0], "pool sizes"),
        ([InContext(0), InContext(1)], RECORDS, [1], "different names"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(
    backbone: Backbone, tmp_path: Path, editors: list[Editor], records: list[EditRecord], sizes: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_evaluation(chosen(*editors), backbone, records, sizes, Judging(), tmp_path / "r.json")
    assert not list(tmp_path.iterdir())
