"""`python -m trainers.speed` on an export of a random model and on training-free editors."""

import json
from pathlib import Path

import pytest
from gist_exports import DATA, SHAPE, export_gists
from speed_rows import ROWS

from trainers.command import run
from trainers.speed import markdown, speed

SMALL = ["--queries=2", "--new_tokens=3", "--repeats=1"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_gists(tmp_path_factory.mktemp("gists") / "editor", "qk")


def test_speed_marks_what_does_not_fit(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(speed, [f"--editor={exported}", DATA, *SMALL, "--edits=4,40,60", "--baselines=icl", f"--out={tmp_path}"])
    told = json.loads((tmp_path / "speed.json").read_text())
    rows = {(r["editor"], r["edits"]): r for r in told["rows"]}
    assert list(rows) == [(e, n) for n in (4, 40, 60) for e in ("incomes", "icl")]
    assert told["meta"]["records"] == 40
    assert told["meta"]["edit_tokens"] > 20
    for (editor, edits), row in rows.items():
        if editor == "icl" and edits > 4:
            assert "the context window has 700" in row["error"]
            assert row["encode_seconds"] is row["reliability"] is None
            continue
        assert row["error"] is None
        assert min(row["encode_seconds"], row["prompt_seconds"], row["token_seconds"]) > 0
        assert row["made_up"] == (edits == 60)
        assert (row["reliability"] is None) == (edits == 60)
    each = rows["incomes", 4]["state_bytes"] // 4
    assert [rows["incomes", n]["state_bytes"] for n in (4, 40, 60)] == [4 * each, 40 * each, 60 * each]
    text = (tmp_path / "speed.md").read_text()
    assert text.count("\n| icl |") == 3
    assert "| incomes | 60* |" in text
    assert "icl, 40 edits: icl: 40 edits are" in text
    assert (tmp_path / "speed.png").stat().st_size > 5000
    assert "60*" in capsys.readouterr().out


def test_speed_of_any_editors(tmp_path: Path) -> None:
    model = ["--backbone.source=random:llama", f"--backbone.overrides={json.dumps(SHAPE)}"]
    editors = ["--editor=['ft_m', 'grace', 'rag']", "--baselines=['unedited']"]
    run(speed, [*model, *editors, DATA, *SMALL, "--edits=6", f"--out={tmp_path}"])
    told = json.loads((tmp_path / "speed.json").read_text())
    rows = {row.pop("editor"): row for row in told["rows"]}
    assert list(rows) == [*list(told["meta"]["editors"])[1:], "unedited"] == ["ft_m", "grace", "rag", "unedited"]
    for name in ("ft_m", "grace", "rag", "unedited"):
        assert rows[name]["error"] is None
        assert min(rows[name]["encode_seconds"], rows[name]["prompt_seconds"]) > 0
        assert rows[name]["reliability"] is not None
    # one matrix [48, 32] whole; six keys and values of a codebook, and how far they reach; six edits' text and vectors
    assert 4 * 48 * 32 < rows["ft_m"]["state_bytes"] < 4 * 48 * 32 + 4000
    assert rows["unedited"]["state_bytes"] == 0 < rows["grace"]["state_bytes"]
    assert rows["rag"]["state_bytes"] > 6 * 100


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--baselines=memit"], "unknown baseline 'memit'; there are: unedited, icl"),
        (["--baselines=icl_right_edit"], "'icl_right_edit' is given each record's own edit"),
        (["--editor=nothing"], "no editor 'nothing'"),
        (["--edits=0"], "must be at least 1"),
        (["--new_tokens=1"], "--new_tokens 1 2"),
        (["--batch_size=0"], "--batch_size 0 must be at least 1"),
        ([f"--out={__file__}"], "--out .* is a file; give another folder"),
    ],
)
def test_speed_says_what_is_wrong(exported: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(speed, [f"--editor={exported}", DATA, *more])


def test_speed_table() -> None:
    lines = markdown(ROWS).splitlines()
    assert lines[2] == "| incomes | 100 | 0.500 | 5.00 | 20.0 | 10.0 | 1.0 | 3 | 90.0 | 80.0 |"
    assert lines[5] == "| incomes | 10,000* | 60.000 | 6.00 | 30.0 | 15.0 | 100.0 | 1,024 | - | - |"
    assert lines[6] == "| icl | 10,000* | - | - | - | - | - | - | - | - |"
    assert lines[-1] == "icl, 10000 edits: icl: no room"
