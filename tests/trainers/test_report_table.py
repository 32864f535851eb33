"""The report as a table."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from evaluation_runs import run
from printed_tables import printed, rows
from rich.console import Console

from modules.backbone import Backbone
from modules.training_free.icl import RightEdit, Unedited
from trainers.report import Report
from trainers.report_table import contradictions, print_table


@pytest.fixture
def backbone(tiny: Any) -> Backbone:
    return tiny()


@pytest.mark.parametrize("exact_match", [False, True])
@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_the_screen(backbone: Backbone, tmp_path: Path, exact_match: bool, width: int) -> None:
    report, _ = run(backbone, tmp_path / "r.json", [Unedited(), RightEdit()], exact_match)
    screen = StringIO()
    print_table(report, Console(file=screen, width=width))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "\x1b" not in text  # no styling where it is no terminal
    assert "…" not in text
    rows = [line.split() for line in text.splitlines() if line.split()[:1] in (["unedited"], ["icl_right_edit"])]
    assert [row[:2] for row in rows] == [["unedited", "4"], ["icl_right_edit", "4"]]
    assert all(len(row) == 2 + 4 * (1 + exact_match) for row in rows)
    assert ("EM" in text) == exact_match
    assert ("Reliability" in text) == (not exact_match)


def made(**values: float) -> dict[str, dict[str, object]]:
    return {name.replace("__", "/"): {"value": v, "ci": [v, v], "records": 1} for name, v in values.items()}


def test_best_is_bold_per_pool_size_and_references_do_not_compete() -> None:
    report: Report = {
        "meta": {},
        "aggregate": {
            "unedited": {"10": made(reliability__token_accuracy=0.1, locality__token_agreement=1.0)},
            "upper": {"10": made(reliability__token_accuracy=1.0, locality__token_agreement=0.9)},
            "a": {
                "10": made(reliability__token_accuracy=0.9, locality__token_agreement=0.80001),
                "20": made(reliability__token_accuracy=0.5, locality__token_agreement=0.0),
            },
            "b": {"10": made(locality__token_agreement=0.8)},
        },
        "runs": {"upper": {"10": {"own_edit_only": True}}},
        "records": {},
    }
    assert rows(report) == [
        ["unedited", "10", "10.0", "100.0"],
        ["upper", "10", "100.0", "90.0"],
        ["a", "10", "**90.0**", "**80.0**"],
        ["a", "20", "**50.0**", "0.0"],
        ["b", "10", "-", "**80.0**"],
    ]


@pytest.mark.parametrize("none", [None, float("nan")])  # read from a file, and in the run itself
def test_a_metric_that_is_no_number_is_shown_and_wins_nothing(none: float | None) -> None:
    broken = {"reliability/token_accuracy": {"value": none, "ci": [none, none], "records": 1}}
    cells = {name: {"10": made(reliability__token_accuracy=value)} for name, value in (("a", 0.5), ("c", 0.2))}
    report: Report = {"meta": {}, "aggregate": {"x": {"10": broken}, **cells, "z": {"10": broken}}, "runs": {}}
    assert rows(report) == [["x", "10", "nan"], ["a", "10", "**50.0**"], ["c", "10", "20.0"], ["z", "10", "nan"]]


def test_contradictions_are_told_once_for_a_number_of_edits() -> None:
    default = {"protocol": "default", "records": 10, "records_contradicted": 3}
    runs = {"a": {"10": default, "1": default | {"records_contradicted": 0}}, "b": {"10": default}}
    rest = "cases, 10 edited together, rest on a fact that another one's edit changes:"
    assert contradictions(runs) == [f"3 of 10 {rest} their multi-hop questions are not asked."]
    strict = {"a": {"10": default | {"protocol": "mquake", "records": 7}}}
    assert contradictions(strict) == [f"3 of 10 {rest} they are not asked."]
    asked = {name: {"10": default | {"records": 2, "edited": edited}} for name, edited in (("upper", 2), ("rome", 10))}
    assert contradictions(asked) == contradictions(runs)
    report: Report = {"meta": {}, "aggregate": {}, "runs": runs, "records": {}}
    assert f"3 of 10 {rest}" in printed(report)


def test_conflicting_edits_are_told_once_for_a_number_of_edits() -> None:
    runs = {
        "right": {"10": {"conflicting_edits": 2, "records": 5, "edited": 5}},  # an upper bound edits what it asks
        "memit": {"1": {"conflicting_edits": 0}, "10": {"conflicting_edits": 2, "records": 5, "edited": 20}},
        "old": {"10": {"records": 5}},
    }
    line = (
        "2 of 20 records, 10 edited together, edit a prompt that another one edits to something else: at most one of "
        "these edits can hold."
    )
    assert contradictions(runs) == [line]
    assert line in printed({"meta": {}, "aggregate": {}, "runs": runs, "records": {}})
