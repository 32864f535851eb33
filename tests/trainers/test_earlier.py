"""What an earlier call left in the file: kept, added to, or refused."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import RECORDS, Failing, chosen, run
from printed_tables import rows
from rich.console import Console

from modules.backbone import Backbone
from modules.editor import Editor
from modules.training_free.icl import InContext, RightEdit, Unedited
from trainers import earlier, evaluation_run
from trainers.editors import Chosen
from trainers.evaluation_run import run_evaluation
from trainers.protocols import Judging
from trainers.report import failures


@pytest.fixture
def backbone(tiny: Any) -> Backbone:
    return tiny()


def test_a_later_call_runs_what_is_missing(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, ran = tmp_path / "results.json", evaluation_run.evaluate_pools, []

    def counted(judge: object, editor: Editor, backbone: object, records: object, size: int, **how: object) -> object:
        if (editor.name, size) == ("icl", 4) and not ran[2:]:
            raise KeyboardInterrupt
        ran.append((editor.name, size))
        return real(judge, editor, backbone, records, size, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation_run, "evaluate_pools", counted)
    with pytest.raises(KeyboardInterrupt):
        run(backbone, out, [Unedited(), InContext()])
    first = json.loads(out.read_text())
    ran.append(("", 0))
    report, screen = run(backbone, out, [Unedited(), InContext()])
    assert ran == [("unedited", 4), ("icl", 2), ("", 0), ("icl", 4)]
    assert f"kept from {out}: unedited at 4, icl at 2" in screen
    assert report["records"]["icl"]["2"] == first["records"]["icl"]["2"]
    assert report["runs"]["unedited"] == first["runs"]["unedited"]  # the seconds are the same
    assert [call["date"] for call in report["meta"]["earlier"]] == [first["meta"]["date"]]
    assert json.loads(out.read_text()) == report


def test_what_is_not_asked_for_stays(backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results.json"
    first, _ = run(backbone, out, [Failing(), Unedited()])
    report, screen = run(backbone, out, [RightEdit()])
    for part in ("aggregate", "runs", "records", "made_of"):
        assert list(report[part]) == ["failing", "unedited", "icl_right_edit"]
        assert {name: report[part][name] for name in first[part]} == first[part]
    assert f"not asked for, and stays in {out}: failing at 2, unedited at 4" in screen
    assert "failing failed with pools of 4" in screen
    assert [row[:2] for row in rows(report)] == [
        ["failing", "2"],
        ["failing", "4"],
        ["unedited", "4"],
        ["icl_right_edit", "4"],
    ]
    monkeypatch.setattr(Failing, "edit", Unedited.edit)
    report, screen = run(backbone, out, [Failing()])
    assert failures(report) == []  # it was tried again
    assert list(report["records"]["failing"]) == ["2", "4"]
    more = run_evaluation(
        chosen(InContext()), backbone, RECORDS, [1], Judging(), out, seed=3, console=Console(file=StringIO())
    )
    assert more["meta"]["pool_sizes"] == [1, 2, 4]
    report, _ = run(backbone, out, [InContext()])
    assert list(report["records"]["icl"]) == ["1", "2", "4"]


def test_a_file_of_another_setup_is_refused(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    run(backbone, out, [Unedited()])
    before = out.read_bytes()
    monkeypatch.setattr(evaluation_run, "evaluate_pools", None)  # nothing may be run
    with pytest.raises(
        ValueError, match=r"--out .* of another setup, which differs in options, protocol; give another"
    ):
        run(backbone, out, [InContext()], exact_match=True)
    with pytest.raises(ValueError, match=r"differs in asked, mode, records, seed, singles;"):
        run_evaluation(
            chosen(InContext()), backbone, RECORDS[1:], [1], Judging(), out, singles=2, mode="single", asked=1
        )
    with pytest.raises(ValueError, match="has results of unedited as it was made of other arguments or files"):
        run_evaluation([Chosen(Unedited(), {"x": 2})], backbone, RECORDS, [2, 4], Judging(), out, seed=3)
    assert out.read_bytes() == before
    out.write_text(json.dumps({"meta": {}, "aggregate": {}, "runs": {}, "records": {}}))  # as of before
    with pytest.raises(ValueError, match="is there, and is no file that this call can add to"):
        run(backbone, out, [Unedited()])


def test_results_of_other_code_are_kept_and_told(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "results.json"
    run(backbone, out, [Unedited()])
    monkeypatch.setattr(earlier, "code", lambda: "corrected")
    monkeypatch.setattr(evaluation_run, "evaluate_pools", None)
    _, screen = run(backbone, out, [Unedited()])
    assert "1 of these results were computed by other code than today's and are kept" in screen
