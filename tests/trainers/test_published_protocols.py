"""`trainers.evaluate --protocol counterfact` and `zsre`: from a published file to the table."""

import json
from pathlib import Path
from typing import Any

import pytest

from modules.counterfact import COUNTERFACT_PROTOCOLS
from modules.fluency import FLUENCY_PROTOCOLS
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
    out.unlink(missing_ok=True)
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


@pytest.mark.parametrize(("protocol", "made"), [("counterfact", rome), ("zsre", mend)])
def test_consecutive_batches_are_judged_as_one_pool_of_all_so_far(tmp_path: Path, protocol: str, made: Any) -> None:
    rows = [made(name) for name in ("Lyon", "Oslo", "Bonn")]
    mode = ["--mode=consecutive", "--batch=2", "--baselines=[icl]"]
    after = call(tmp_path, protocol, rows, *mode)
    assert (after["meta"]["protocol"], after["meta"]["mode"]) == (protocol, "consecutive")
    assert list(after["aggregate"]["icl"]) == ["2", "3"]
    runs = after["runs"]["icl"]
    assert runs["3"]["context_tokens"] > runs["2"]["context_tokens"] > 0
    assert (runs["3"]["protocol"], runs["3"]["queries"] > runs["2"]["queries"]) == (protocol, True)
    first = {point["edits"]: point["first"] for point in after["curves"]["icl"]}
    assert first[2] == {name: cell["value"] for name, cell in after["aggregate"]["icl"]["2"].items()}
    at_once = call(tmp_path, protocol, rows, "--pool_sizes=[3]", "--baselines=[icl]")
    assert after["aggregate"]["icl"]["3"] == at_once["aggregate"]["icl"]["3"]
    assert after["records"]["icl"]["3"] == at_once["records"]["icl"]["3"]


WRITES = {"generation_prompts": ["It is", "It is", "One of"]}


def test_fluency_and_consistency_beside_the_unedited_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [rome(name, **WRITES) for name in ("Lyon", "Oslo")]
    for row in rows:
        row["requested_rewrite"] |= {"relation_id": "P17", "target_new": {"str": "Peru", "id": "Q419"}}
    texts = tmp_path / "snippets.json"
    samples = [{"name": "Lima", "text": "Lima is a city in Peru"}]
    texts.write_text(json.dumps([{"relation_id": "P17", "target_id": "Q419", "samples": samples}]))
    mode = ["--mode=consecutive", "--batch=1", "--baselines=[unedited,icl]", "--fluency=true"]
    report = call(tmp_path, "counterfact", rows, *mode, f"--references={texts}")
    for editor in ("unedited", "icl"):
        for stop in ("1", "2"):
            cell = report["aggregate"][editor][stop]
            assert set(cell) == {*COUNTERFACT_PROTOCOLS, *FLUENCY_PROTOCOLS}
            assert cell["fluency/ngram_entropy"]["value"] > 0
            assert cell["fluency/ngram_entropy"]["ci"][0] <= cell["fluency/ngram_entropy"]["value"]
    assert set(report["meta"]["protocols"]) == {*COUNTERFACT_PROTOCOLS, *FLUENCY_PROTOCOLS}
    assert "answer_seconds_per_query" not in report["runs"]["icl"]["2"]
    screen = capsys.readouterr().out
    lines = [line.split() for line in screen.splitlines()]
    assert [line[:2] for line in lines if line[:1] == ["unedited"]] == [["unedited", "1"], ["unedited", "2"]]
    screen = " ".join(screen.split())
    assert "NS NM GE RS Context" in screen  # no seconds a query: writing is none
    assert "RS: TF-IDF cosine" in screen
    call(tmp_path, "counterfact", rows[:1], "--mode=single", "--baselines=[unedited]", "--fluency=true")
    assert "RS was not measured: no --references" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("protocol", "more", "message"),
    [
        ("zsre", ["--fluency=true"], "--fluency is of --protocol counterfact; the protocol is zsre"),
        ("counterfact", ["--references=x.json"], "--references are for the consistency"),
        ("counterfact", ["--fluency=true"], "record 'Lyon' has no generation prompts"),
        ("counterfact", ["--fluency=true", "--references=x.json"], "--references: no file x.json"),
    ],
)
def test_fluency_that_cannot_be_is_refused_before_a_model_is_loaded(
    tmp_path: Path, protocol: str, more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        call(tmp_path, protocol, [rome("Lyon")], "--backbone.source=/nowhere/at/all", *more)
