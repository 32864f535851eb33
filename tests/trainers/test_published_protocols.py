"""`trainers.evaluate --protocol counterfact` and `zsre`: from a published file to the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from modules.counterfact import COUNTERFACT_PROTOCOLS
from modules.zsre import ZSRE_PROTOCOLS
from trainers.command import run
from trainers.evaluate import evaluate

SHAPE = (
    '{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, '
    '"intermediate_size": 64}'
)


def rome(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "case_id": name,
        "requested_rewrite": {
            "prompt": "{} is in",
            "subject": name,
            "target_new": {"str": "Peru"},
            "target_true": {"str": "France"},
        },
        "paraphrase_prompts": [f"{name} lies in", f"Where is {name}? In"],
        "neighborhood_prompts": ["Nice is in", "Metz is in"],
    } | changes


def mend(name: str) -> dict[str, Any]:
    return {
        "src": f"Where is {name}?",
        "subject": name,
        "alt": "Peru",
        "rephrase": f"What is the country of {name}?",
        "loc": "nq question: who wrote hamlet",
        "loc_ans": "Shakespeare",
    }


def easyedit(name: str) -> dict[str, Any]:
    return {
        "case_id": 1,
        "prompt": f"{name} is in",
        "target_new": "Peru",
        "subject": name,
        "ground_truth": "France",
        "rephrase_prompt": f"{name} lies in",
        "locality_prompt": "Nice is in",
        "locality_ground_truth": "France",
    }


def call(folder: Path, protocol: str, rows: list[dict[str, Any]], *more: str) -> dict[str, Any]:
    path, out = folder / "data.json", folder / "out.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    form = "zsre" if protocol == "zsre" else "counterfact"
    source = json.dumps([{"format": form, "path": str(path)}])
    given = [f"--data={source}", f"--protocol={protocol}", f"--out={out}", "--backbone.source=random:llama"]
    run(evaluate, [*given, f"--backbone.overrides={SHAPE}", *more])
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("protocol", "made", "metrics", "heads"),
    [
        ("counterfact", rome, COUNTERFACT_PROTOCOLS, "S ES EM PS PM NS NM"),
        ("counterfact", easyedit, COUNTERFACT_PROTOCOLS, "S ES EM PS PM NS NM"),
        ("zsre", mend, ZSRE_PROTOCOLS, "Score Efficacy Paraphrase Specificity"),
    ],
)
def test_from_a_published_file_to_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: str, made: Any, metrics: dict[str, str], heads: str
) -> None:
    rows = [made(name) for name in ("Lyon", "Oslo", "Bonn")]
    report = call(tmp_path, protocol, rows, "--pool_sizes=[3]")
    assert report["meta"]["protocols"] == metrics
    cells = {editor: sizes["3"] for editor, sizes in report["aggregate"].items()}
    assert set(cells) == {"unedited", "icl", "icl_right_edit"}
    assert all(set(cell) == set(metrics) for cell in cells.values())
    assert {row["records"] for cell in cells.values() for row in cell.values()} == {3}
    runs = {editor: sizes["3"] for editor, sizes in report["runs"].items()}
    assert runs["unedited"]["context_tokens"] == 0
    assert runs["icl"]["context_tokens"] > 2 * runs["icl_right_edit"]["context_tokens"] > 0
    for facts in runs.values():
        assert facts["answer_seconds_per_query"] == pytest.approx(facts["answer_seconds"] / facts["queries"])
    screen = capsys.readouterr().out
    lines = [line for line in screen.splitlines() if "written to" not in line]
    assert max(map(len, lines)) <= 80
    head = next(line.split() for line in lines if line.strip().startswith("Editor"))
    assert head == ["Editor", "Pool", *heads.split(), "Seconds", "Context"]
    row = next(line.split() for line in lines if line.split()[:1] == ["icl"])
    assert (len(row), float(row[-1])) == (len(head), round(runs["icl"]["context_tokens"], 1))
    assert "harmonic mean" in screen


def test_single_edits(tmp_path: Path) -> None:
    rows = [rome("Lyon"), rome("Oslo")]
    report = call(tmp_path, "counterfact", rows, "--mode=single", "--baselines=[icl]")
    assert len(report["records"]["icl"]["1"]) == 2
    assert report["runs"]["icl"]["1"]["pools"] == 2


def test_a_record_without_what_is_needed_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    lame = rome("Oslo", neighborhood_prompts=[])
    with pytest.raises(SystemExit, match="--protocol counterfact: record 'Oslo' has no neighborhood queries"):
        call(tmp_path, "counterfact", [rome("Lyon"), lame], "--backbone.source=/nowhere/at/all")
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("protocol", ["counterfact", "zsre"])
def test_consecutive_modes_are_refused(tmp_path: Path, protocol: str) -> None:
    rows = [mend("Lyon")] if protocol == "zsre" else [rome("Lyon")]
    with pytest.raises(SystemExit, match=f"--protocol {protocol} is of --mode single and batch"):
        call(tmp_path, protocol, rows, "--mode=sequential")
