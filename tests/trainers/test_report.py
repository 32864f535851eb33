"""The report: its shape, its tables, and what happens when an editor fails."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.editor import Edited, Editor
from modules.metrics import PROTOCOLS
from modules.training_free.icl import InContext, RightEdit, Unedited
from trainers import earlier, evaluation_run
from trainers.editors import Chosen
from trainers.evaluation_run import run_evaluation
from trainers.protocols import Judging
from trainers.report import Report, failures
from trainers.report_table import contradictions, print_table
from trainers.written import check_file, write_json

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
RECORDS = [
    EditRecord(
        name,
        (EditRequest(f"{name} is in", "Peru", name),),
        rephrases=(Query(f"Where is {name}? In", ("Peru",)),),
        locality={"far": (Query("2 + 2 =", ("four",)),)},
        portability={"hop": (Query(f"People of {name} speak", ("Spanish",)),)},
    )
    for name in ("Lyon", "Oslo", "Nice", "Bonn")
]


class Failing(Editor):
    """Fails with more than two edits."""

    name = "failing"

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        if len(requests) > 2:
            raise ValueError("at most two edits")
        yield Edited(backbone)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    torch.manual_seed(0)
    return load_backbone(BackboneConfig("random:llama", overrides=SHAPE))


def chosen(*editors: Editor) -> list[Chosen]:
    return [Chosen(editor, {"name": editor.name}) for editor in editors]


def run(backbone: Backbone, out: Path, editors: Sequence[Editor], exact_match: bool = False) -> tuple[Report, str]:
    screen = StringIO()
    console = Console(file=screen, width=100)
    report = run_evaluation(
        chosen(*editors),
        backbone,
        RECORDS,
        [2, 4],
        Judging(exact_match=exact_match),
        out,
        data="four cities",
        seed=3,
        console=console,
    )
    return report, screen.getvalue()


def test_schema(backbone: Backbone, tmp_path: Path) -> None:
    out = tmp_path / "new" / "results.json"
    report, _ = run(backbone, out, [Unedited(), InContext()])
    assert json.loads(out.read_text()) == report
    assert set(report) == {"meta", "made_of", "aggregate", "runs", "records"}
    meta = report["meta"]
    assert set(meta) == {
        "date",
        "hardware",
        "command",
        "data",
        "records",
        "edits",
        "mode",
        "protocol",
        "queries_per_kind",
        "pool_sizes",
        "backbone",
        "seed",
        "setup",
        "versions",
        "protocols",
    }
    assert (meta["data"], meta["records"], meta["edits"], meta["seed"]) == ("four cities", 4, 4, 3)
    assert (meta["mode"], meta["pool_sizes"], meta["protocols"]) == ("batch", [2, 4], PROTOCOLS)
    assert meta["backbone"]["source"] == "random:llama"
    assert meta["versions"]["torch"] == torch.__version__
    assert {"palimpsest", "torch", "transformers", "lightning"} <= set(meta["versions"])
    for part in ("aggregate", "runs", "records"):
        assert {editor: list(cells) for editor, cells in report[part].items()} == {
            "unedited": ["4"],  # no pool matters to it: the largest tells all
            "icl": ["2", "4"],
        }
    assert set(report["aggregate"]["icl"]["4"]) == {
        "reliability/token_accuracy",
        "generality/token_accuracy",
        "locality/token_agreement",
        "locality/far/token_agreement",
        "portability/token_accuracy",
        "portability/hop/token_accuracy",
    }
    assert set(report["aggregate"]["icl"]["4"]["reliability/token_accuracy"]) == {"value", "ci", "records"}
    assert set(report["runs"]["icl"]["4"]) == {
        "edit_seconds",
        "answer_seconds",
        "edit_bytes",
        "answer_seconds_per_query",
        "code",
        "context_tokens",
        "protocol",
        "exact_match",
        "batch_size",
        "max_new_tokens",
        "own_edit_only",
        "edited",
        "pools",
        "records",
        "records_dropped",
        "queries",
        "requests",
        "queries_left_out",
        "records_contradicted",
        "conflicting_edits",
        "bootstrap_seed",
    }
    run_facts = report["runs"]["icl"]["4"]
    assert (run_facts["queries"], report["runs"]["unedited"]["4"]["context_tokens"]) == (4 * 3 + 1, 0)  # one is shared
    assert run_facts["context_tokens"] == len(" ".join(r.request.statement for r in RECORDS)) + 1  # a token a byte
    assert run_facts["answer_seconds_per_query"] == pytest.approx(run_facts["answer_seconds"] / 13)
    record = report["records"]["icl"]["4"][0]
    assert set(record) == {"case_id", "requested_rewrite", "pre", "post", "left_out"}
    assert set(record["post"]) == {"rewrite_acc", "rephrase_acc", "locality", "portability"}


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


def printed(report: Report, **how: Any) -> str:
    screen = StringIO()
    print_table(report, Console(file=screen, width=200, **how))
    return screen.getvalue()


def rows(report: Report) -> list[list[str]]:
    """The table below its head, what is printed bold between asterisks."""
    text = printed(report, force_terminal=True, color_system="standard")
    body = re.split(r"\n *\n", text.split("─ \n")[1])[0]
    return [re.sub(r"\x1b\[1m *(.*?)\x1b\[0m", r"**\1**", line).split() for line in body.splitlines()]


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


def test_write_is_whole_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_json(path, {"meta": {"a": 1}})
    with pytest.raises(TypeError):
        write_json(path, {"meta": object()})
    assert json.loads(path.read_text()) == {"meta": {"a": 1}}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_numbers_that_are_none_are_written_as_null_and_told(tmp_path: Path) -> None:
    path, norms = tmp_path / "r.json", {"unedited": 1.5, "edited": float("inf")}
    with pytest.warns(
        UserWarning, match=r"r\.json: null stands for 3 numbers .*, the first is curves/a/0/norms/edited"
    ):
        write_json(path, {"curves": {"a": [{"norms": norms}]}, "ci": (float("nan"), float("-inf"), 2), "name": "nan"})
    assert json.loads(path.read_text()) == {
        "curves": {"a": [{"norms": {"unedited": 1.5, "edited": None}}]},
        "ci": [None, None, 2],
        "name": "nan",
    }
    assert norms["edited"] == float("inf")  # what is written is a copy


@pytest.mark.parametrize("none", [None, float("nan")])  # read from a file, and in the run itself
def test_a_metric_that_is_no_number_is_shown_and_wins_nothing(none: float | None) -> None:
    broken = {"reliability/token_accuracy": {"value": none, "ci": [none, none], "records": 1}}
    cells = {name: {"10": made(reliability__token_accuracy=value)} for name, value in (("a", 0.5), ("c", 0.2))}
    report: Report = {"meta": {}, "aggregate": {"x": {"10": broken}, **cells, "z": {"10": broken}}, "runs": {}}
    assert rows(report) == [["x", "10", "nan"], ["a", "10", "**50.0**"], ["c", "10", "20.0"], ["z", "10", "nan"]]


def test_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    path = tmp_path / "r.json"
    write_json(path, {"meta": 1})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_json(path, {"meta": 2})
    assert json.loads(path.read_text()) == {"meta": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


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


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--out .* is a folder; give a file in it, such as .*results\.json"):
        check_file(tmp_path, "--out")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .* cannot be written: .*; give another file"):
        check_file(tmp_path / "file" / "results.json", "--out")
    check_file(tmp_path / "new" / "results.json", "--out")
    assert list((tmp_path / "new").iterdir()) == []
