"""A run of consecutive editing: its file, its figure, what a later call keeps, and the command."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from deltas import Nudge
from rich.console import Console

from datamodules.records import EditRecord
from modules import modes
from modules.backbone import Backbone
from modules.training_free.icl import InContext, Unedited
from trainers import earlier
from trainers import evaluate as evaluate_command
from trainers import retention as module
from trainers.command import run as command
from trainers.drawing import curves
from trainers.editors import Chosen
from trainers.protocols import Judging
from trainers.retention import run_consecutive

METRIC = "reliability/token_accuracy"


@pytest.fixture
def backbone(tiny: Any) -> Backbone:
    return tiny()


def chosen(**changes: Any) -> list[Chosen]:
    nudge = {"layers": [1], **changes}
    return [Chosen(Unedited(), {"x": 1}), Chosen(Nudge(**nudge), nudge)]


def run(backbone: Backbone, records: list[EditRecord], out: Path, editors: list[Chosen], batch: int = 1) -> Any:
    screen = StringIO()
    report = run_consecutive(
        editors, backbone, records, batch, [1, 2], Judging(), out, console=Console(file=screen, width=100)
    )
    assert json.loads(out.read_text()) == report
    return report, screen.getvalue()


def test_file_and_figure(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    monkeypatch.setattr(module, "retention", lambda report: drawn.append(curves.retention(report)) or drawn[0])
    report, screen = run(backbone, records, tmp_path / "r.json", chosen())
    assert report["meta"]["mode"] == "sequential"
    assert report["meta"]["pool_sizes"] == [1, 2, 4]
    assert list(report["aggregate"]["nudge"]) == ["1", "2", "4"]
    points = report["curves"]["nudge"]
    assert [p["edits"] for p in points] == [1, 2, 4]
    assert all(p["seconds_per_edit"] == p["edit_seconds"] / p["edits"] > 0 for p in points)
    assert points[0]["first"][METRIC] == report["aggregate"]["nudge"]["1"][METRIC]["value"]
    (norm,) = {tuple(p["norms"]) for p in points}
    assert norm == ("model.layers.1.mlp.down_proj",)
    assert {name: made["facts"] for name, made in report["made_of"].items()} == {
        "unedited": {"x": 1},
        "nudge": {"layers": [1]},
    }
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert "1 at a time" in screen
    panels = {axes.get_title(): axes for axes in drawn[0].axes}
    assert list(panels) == ["Reliability", "Generality", "Locality", "Portability", "L1 norm of edited matrices"]
    growth = panels["L1 norm of edited matrices"].get_lines()[0].get_ydata()
    norms = [p["norms"][norm[0]] for p in points]
    assert list(growth) == pytest.approx([100 * (n["edited"] / n["unedited"] - 1) for n in norms])
    locality = [report["aggregate"]["nudge"][n]["locality/token_agreement"]["value"] for n in ("1", "2", "4")]
    lines = {(line.get_label(), line.get_linestyle()): list(line.get_ydata()) for line in panels["Locality"].lines}
    assert lines["nudge", "-"] == locality
    assert lines["unedited", "-"] == [1, 1, 1]


def test_a_later_call_keeps_what_is_finished(backbone: Backbone, records: list[EditRecord], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    first, _ = run(backbone, records, out, chosen())
    Nudge.calls.clear()
    again, screen = run(backbone, records, out, [*chosen(), Chosen(InContext(), {})])
    assert Nudge.calls == []
    assert "kept from" in screen
    assert again["curves"]["nudge"] == first["curves"]["nudge"]
    assert again["records"]["nudge"] == first["records"]["nudge"]
    assert list(again["curves"]) == ["unedited", "nudge", "icl"]
    assert [call["date"] for call in again["meta"]["earlier"]] == [first["meta"]["date"]]


def test_editors_that_are_not_asked_for_stay(backbone: Backbone, records: list[EditRecord], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    first, _ = run(backbone, records, out, chosen())
    again, screen = run(backbone, records, out, [Chosen(InContext(), {})])
    for part in ("aggregate", "runs", "records", "curves", "made_of"):
        assert list(again[part]) == ["unedited", "nudge", "icl"]
        assert {name: again[part][name] for name in first[part]} == first[part]
    assert f"not asked for, and stays in {out}: unedited, nudge" in screen
    assert [line.split()[:2] for line in screen.splitlines() if line.split()[:1] == ["nudge"]] == [
        ["nudge", "1"],
        ["nudge", "2"],
        ["nudge", "4"],
    ]


def test_a_file_of_another_setup_is_refused(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    run(backbone, records, out, chosen())
    before = out.read_bytes()
    Nudge.calls.clear()
    with pytest.raises(ValueError, match=r"--out .*r\.json has results of nudge as it was made of other arguments"):
        run(backbone, records, out, chosen(layers=[2]))
    with pytest.raises(ValueError, match=r"differs in batch, checkpoints, mode; give another --out"):
        run(backbone, records, out, chosen(), batch=2)
    with pytest.raises(ValueError, match=r"differs in checkpoints, records;"):
        run(backbone, records[:3], out, chosen())
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "config", replace(backbone.config, overrides={"rope_theta": 5}))
        with pytest.raises(ValueError, match=r"differs in overrides;"):
            run(backbone, records, out, chosen())
    backbone.model.get_input_embeddings().weight.data[5] += 1
    with pytest.raises(ValueError, match=r"differs in weights;"):
        run(backbone, records, out, chosen())
    assert Nudge.calls == []
    assert out.read_bytes() == before


def test_results_are_of_what_files_held(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, solved = tmp_path / "texts.txt", tmp_path / "solved.txt"
    texts.write_text("one")
    solved.write_text("one")
    editors = [Chosen(Nudge([1]), {"layers": [1], "texts": "texts.txt"})]
    judging = Judging()
    told = {**judging.told(), "references": "solved.txt"}
    monkeypatch.setattr(Judging, "told", lambda _: told)
    run(backbone, records, tmp_path / "r.json", editors)
    run(backbone, records, tmp_path / "r.json", editors)
    texts.write_text("two")
    with pytest.raises(ValueError, match="results of nudge as it was made of other arguments or files"):
        run(backbone, records, tmp_path / "r.json", editors)
    texts.write_text("one")
    solved.write_text("two")
    with pytest.raises(ValueError, match="differs in protocol's files;"):
        run(backbone, records, tmp_path / "r.json", editors)


def test_results_of_other_code_are_kept_and_told(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "r.json"
    run(backbone, records, out, chosen())
    assert "other code" not in run(backbone, records, out, chosen())[1]
    Nudge.calls.clear()
    monkeypatch.setattr(earlier, "code", lambda: "corrected")
    assert "6 of these results were computed by other code" in run(backbone, records, out, chosen())[1]
    assert Nudge.calls == []


@pytest.mark.filterwarnings("ignore:.*null stands for")
def test_norms_that_are_none_end_no_run_nor_a_later_one(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = modes.norms
    monkeypatch.setattr(
        modes, "norms", lambda *given: {n: of._replace(edited=float("nan")) for n, of in real(*given).items()}
    )
    out, editors = tmp_path / "r.json", chosen()
    for kept in (False, True):  # the second time what it wrote is read
        screen = StringIO()
        report = run_consecutive(
            editors, backbone, records, 1, [2], Judging(), out, console=Console(file=screen, width=100)
        )
        assert ("kept from" in screen.getvalue()) == kept
        assert list(report["runs"]) == ["unedited", "nudge"]
        (norm,) = json.loads(out.read_text())["curves"]["nudge"][0]["norms"].values()
        assert norm["edited"] is None
        assert norm["unedited"] > 0
        growth = next(axes for axes in curves.retention(report).axes if "norm" in axes.get_title())
        assert all(value != value for value in growth.get_lines()[0].get_ydata())


def test_a_failure_is_marked_where_it_came_and_tried_again(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path
) -> None:
    out = tmp_path / "r.json"
    report, screen = run(backbone, records, out, chosen(fails_after=1), batch=2)
    assert report["aggregate"]["nudge"] == {"2": {"error": "ValueError: at most 1 edits"}}
    assert list(report["made_of"]) == ["unedited"]
    assert "at most 1 edits" in screen
    other, _ = run(backbone, records, out, [Chosen(InContext(), {})], batch=2)
    assert other["aggregate"]["nudge"] == report["aggregate"]["nudge"]  # the mark stays while it is not asked for
    report, _ = run(backbone, records, out, chosen(fails_after=2), batch=2)
    assert list(report["made_of"]) == ["unedited", "icl", "nudge"]
    assert list(report["runs"]["nudge"]) == ["2", "4"]


def test_a_stopped_run_leaves_its_checkpoints(
    backbone: Backbone, records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "r.json", Nudge.terms

    def terms(self: Any, backbone: Any, requests: Any, old: Any) -> Any:
        if old and next(iter(old.values())).a.shape[1] == 2:
            raise KeyboardInterrupt
        return plain(self, backbone, requests, old)

    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Nudge, "terms", terms)
        with pytest.raises(KeyboardInterrupt):
            run(backbone, records, out, chosen())
    report = json.loads(out.read_text())
    assert list(report["aggregate"]["nudge"]) == ["1", "2"]
    other, _ = run(backbone, records, out, [Chosen(InContext(), {})])
    assert other["curves"]["nudge"] == report["curves"]["nudge"]
    with monkeypatch.context() as patch:
        patch.setattr(Nudge, "terms", interrupted)
        last = InContext()
        last.name = "last"
        with pytest.raises(KeyboardInterrupt):  # before it has reached anything again, and another one has
            run(backbone, records, out, [Chosen(last, {}), *chosen()])
    assert json.loads(out.read_text())["curves"]["nudge"] == report["curves"]["nudge"]
    report, _ = run(backbone, records, out, chosen())
    assert [p["edits"] for p in report["curves"]["nudge"]] == [1, 2, 4]


def test_seconds_are_of_a_request(backbone: Backbone, records: list[EditRecord], tmp_path: Path) -> None:
    double = [replace(record, requests=(*record.requests, *record.requests)) for record in records]
    report, _ = run(backbone, double, tmp_path / "r.json", chosen())
    points = report["curves"]["nudge"]
    assert [p["edits"] for p in points] == [1, 2, 4]
    assert all(p["seconds_per_edit"] == p["edit_seconds"] / (2 * p["edits"]) for p in points)


@pytest.mark.parametrize(
    ("mode", "wanted"),
    [
        (["--mode=sequential", "--checkpoints", "1,2"], {"1": 1, "2": 2, "3": 3}),
        (["--mode=consecutive", "--batch=2"], {"2": 2, "3": 3}),
        (["--mode=single"], {"1": 3}),
        (["--mode=batch", "--batch=3"], {"3": 3}),
    ],
)
def test_modes_by_the_command(mode: list[str], wanted: dict[str, int], tmp_path: Path) -> None:
    nudge, out = tmp_path / "nudge.yaml", tmp_path / "r.json"
    nudge.write_text(yaml.safe_dump({"class_path": "deltas.Nudge", "init_args": {"layers": [1]}}))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = json.dumps({"source": "random:llama", "overrides": shape})
    data = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    given = [f"--backbone={backbone}", f"--data={data}", "--records=3", "--exact_match=false", f"--out={out}"]
    given += ["--queries_per_kind=2"]
    command(evaluate_command.evaluate, ["--editor", str(nudge), *given, *mode])
    report = json.loads(out.read_text())
    assert report["meta"]["mode"] in mode[0]
    assert report["meta"]["queries_per_kind"] == 2
    assert {n: len(found) for n, found in report["records"]["nudge"].items()} == wanted
    assert "unedited" in report["aggregate"]
    assert ("curves" in report) == (mode[0] in ("--mode=sequential", "--mode=consecutive"))


@pytest.mark.parametrize(
    "mode", [["--mode=consecutive"], ["--mode=sequential", "--batch=2"], ["--mode=single", "--checkpoints=1"]]
)
def test_modes_that_do_not_go_together_are_refused(mode: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"the mode is single|do not go together"):
        command(evaluate_command.evaluate, ['--data=[{"format": "facts"}]', *mode])
