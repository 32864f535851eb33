"""General ability by the command: cells, changes, what a later call keeps, and what fails."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from deltas import Nudge
from lm_eval_files import mmlu, text_tasks
from rich.console import Console

from datamodules.records import EditRecord
from modules.ability.measure import change
from modules.ability.sst2 import Sst2
from modules.ability.task import Task
from modules.backbone import Backbone
from modules.training_free.icl import InContext, Unedited
from trainers import ability as ability_command
from trainers import earlier
from trainers.ability import task
from trainers.ability_run import run_ability
from trainers.ability_table import markdown
from trainers.command import run as command
from trainers.editors import Chosen


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Data of two tasks where the tasks' defaults look for them; no SAMSum."""
    monkeypatch.setenv("PALIMPSEST_DATA", str(tmp_path / "data"))
    for name in ("sst2", "nq_open"):
        (tmp_path / "data" / "general" / name).mkdir(parents=True)
    rows = "".join(f"film number {i} is {'fine' if i % 3 else 'bad'}\t{int(i % 3 > 0)}\n" for i in range(12))
    (tmp_path / "data/general/sst2/dev.tsv").write_text("text\tlabel\n" + rows)
    questions = "\n".join(json.dumps({"question": f"who {i}", "answer": ["me"]}) for i in range(4))
    (tmp_path / "data/general/nq_open/NQ-open.dev.jsonl").write_text(questions)
    return tmp_path


@pytest.fixture
def backbone(tiny: Any) -> Backbone:
    return tiny()


def chosen(**changes: Any) -> list[Chosen]:
    nudge = {"layers": [1, 2], **changes}
    return [Chosen(Nudge(**nudge), nudge)]


def run(backbone: Backbone, records: list[EditRecord], out: Path, **given: Any) -> tuple[dict[str, Any], str]:
    screen = StringIO()
    options: dict[str, Any] = {"tasks": [task("sst2")], "editors": chosen(), "counts": [0, 1, 3], "batch": None}
    report = run_ability(
        **(options | {"backbone": backbone, "records": records[:3], "examples": 8, "out": out} | given),
        console=Console(file=screen, width=120),
    )
    assert json.loads(out.read_text()) == report
    return report, screen.getvalue()


def test_file_and_table(backbone: Backbone, records: list[EditRecord], folder: Path) -> None:
    tasks: list[Task] = [task("sst2"), task("samsum"), task("nq_open", released=True)]
    report, screen = run(backbone, records, folder / "a.json", tasks=tasks)
    assert {e: list(by) for e, by in report["cells"].items()} == {"unedited": ["0"], "nudge": ["1", "3"]}
    before, after = report["cells"]["unedited"]["0"], report["cells"]["nudge"]["3"]
    assert list(before) == ["sst2", "nq_open"]
    assert [e["id"] for e in before["sst2"]["examples"]] == [e["id"] for e in after["sst2"]["examples"]]
    assert len(before["sst2"]["examples"]) == 8
    assert before["sst2"]["examples"] != after["sst2"]["examples"]  # such edits are not harmless
    assert after["sst2"]["change"] == change(before["sst2"], after["sst2"], seed=0)
    assert "change" not in before["sst2"]
    assert after["sst2"]["edit_seconds"] > 0
    value = after["sst2"]["metrics"]["sst2/accuracy"]
    assert value["value"] == sum(e["values"]["sst2/accuracy"] for e in after["sst2"]["examples"]) / 8
    meta = report["meta"]
    assert meta["edited_after"] == [0, 1, 3]
    assert meta["mode"] == "batch"
    assert set(meta["protocols"]) == {"sst2/accuracy", *task("nq_open", released=True).protocols}
    assert "test-summarization" in meta["left_out"]["samsum"]
    assert "left out: samsum, no file general/samsum/test-summarization.json.gz" in screen
    table = (folder / "a.md").read_text().splitlines()
    assert table[0] == "| Editor | Edits | sst2 | nq_open |"
    low, high = (f"{100 * end:.1f}" for end in value["ci"])
    assert table[4].startswith(f"| nudge | 3 | {100 * value['value']:.1f} [{low}, {high}] (")
    assert any(line.startswith("Percent of 8 examples of sst2/accuracy; 4 examples of nq_open/") for line in table)
    report["meta"]["tasks"]["nq_open"]["examples"] = 8
    assert "\nPercent of 8 examples each of sst2/accuracy, nq_open/" in markdown(report)
    assert any(line.startswith("Left out: samsum") for line in table)
    assert "nudge" in screen


def test_a_later_call_keeps_what_is_made_of_the_same(
    backbone: Backbone, records: list[EditRecord], folder: Path
) -> None:
    out = folder / "a.json"
    first, _ = run(backbone, records, out)
    Nudge.calls.clear()
    again, screen = run(backbone, records, out)
    assert again["cells"] == first["cells"]
    assert Nudge.calls == []
    assert "3 results" in screen
    run(backbone, records, out, counts=[0, 1, 2, 3])  # one more
    assert Nudge.calls == [2]
    more, _ = run(backbone, records, out, tasks=[task("sst2"), task("nq_open")])  # another task at all of them
    assert Nudge.calls == [2, 1, 3]
    assert more["cells"]["nudge"]["3"]["sst2"] == first["cells"]["nudge"]["3"]["sst2"]
    assert more["meta"]["earlier"][0]["date"] == first["meta"]["date"]


def test_what_is_not_asked_for_stays(backbone: Backbone, records: list[EditRecord], folder: Path) -> None:
    out = folder / "a.json"
    first, _ = run(backbone, records, out, tasks=[task("sst2"), task("nq_open")])
    other = Nudge(layers=[2])
    other.name = "other"
    again, screen = run(backbone, records, out, editors=[Chosen(other, {"layers": [2]})], counts=[2])
    assert {name: again["cells"][name] for name in first["cells"]} == first["cells"]
    assert list(again["cells"]["other"]) == ["2"]
    assert f"not asked for, and stays in {out}: 6 results" in screen
    meta = again["meta"]
    assert list(meta["tasks"]) == ["sst2", "nq_open"]
    assert meta["protocols"] == first["meta"]["protocols"]
    assert meta["edited_after"] == [0, 1, 2, 3]
    assert meta["edited"] == first["meta"]["edited"]
    assert "change" in again["cells"]["other"]["2"]["sst2"]  # from the unedited model as it stands in the file
    table = (folder / "a.md").read_text().splitlines()
    assert table[0] == "| Editor | Edits | sst2 | nq_open |"
    assert [line.split("|")[1].strip() for line in table[2:6]] == ["unedited", "nudge", "nudge", "other"]
    Nudge.calls.clear()
    run(backbone, records, out, tasks=[task("sst2"), task("nq_open")])
    assert Nudge.calls == []


def test_a_file_of_another_setup_is_refused(
    backbone: Backbone, records: list[EditRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "a.json"
    run(backbone, records, out)
    before = out.read_bytes()
    Nudge.calls.clear()
    other = chosen()
    other[0].editor.name = "other"
    with pytest.raises(ValueError, match=r"--out .*a\.json has results of another setup, which differs in records;"):
        run(backbone, [records[1], *records], out, editors=other, counts=[1])
    with pytest.raises(ValueError, match="differs in examples of sst2; give another --out, or remove the file"):
        run(backbone, records, out, editors=other, examples=7)
    with pytest.raises(ValueError, match="differs in batch, seed;"):
        run(backbone, records, out, editors=other, batch=1, seed=1)
    with pytest.raises(ValueError, match="has results of nudge as it was made of other arguments"):
        run(backbone, records, out, editors=chosen(layers=[2]), counts=[2])
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "config", replace(backbone.config, overrides={"rope_theta": 5}))
        with pytest.raises(ValueError, match="differs in overrides;"):
            run(backbone, records, out)
    backbone.model.get_input_embeddings().weight.data[5] += 1
    with pytest.raises(ValueError, match="differs in weights;"):
        run(backbone, records, out)
    assert Nudge.calls == []
    assert out.read_bytes() == before
    out.write_text("[]")
    with pytest.raises(ValueError, match="is there, and is no file that this call can add to"):
        run(backbone, records, out)


def test_results_are_of_what_files_held_and_of_other_code_told(
    backbone: Backbone, records: list[EditRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    out, text = folder / "a.json", folder / "text.txt"
    text.write_text("one")
    editors = [Chosen(Nudge(layers=[1]), {"layers": [1], "text": "text.txt"})]
    run(backbone, records, out, editors=editors)
    screen = run(backbone, records, out, editors=editors)[1]
    assert "3 results" in screen
    assert "other code" not in screen
    with monkeypatch.context() as patch:
        patch.setattr(earlier, "code", lambda: "corrected")
        assert "3 of these results were computed by other code" in run(backbone, records, out, editors=editors)[1]
    text.write_text("two")
    with pytest.raises(ValueError, match="results of nudge as it was made of other arguments or files"):
        run(backbone, records, out, editors=editors)


def test_batch_after_batch_starts_from_the_first_where_one_is_missing(
    backbone: Backbone, records: list[EditRecord], folder: Path
) -> None:
    out = folder / "a.json"
    Nudge.calls.clear()
    report, _ = run(backbone, records, out, batch=1)
    assert Nudge.calls == [1, 1, 1]
    assert report["meta"]["mode"] == "sequential"
    run(backbone, records, out, batch=1, counts=[0, 1, 2])
    assert Nudge.calls[3:] == [1, 1]


def test_a_failure_is_marked_and_tried_again(backbone: Backbone, records: list[EditRecord], folder: Path) -> None:
    out = folder / "a.json"
    report, screen = run(backbone, records, out, editors=[*chosen(fails_after=1), Chosen(InContext(), {})])
    assert report["cells"]["nudge"]["3"]["sst2"] == {"error": "ValueError: at most 1 edits"}
    assert "metrics" in report["cells"]["nudge"]["1"]["sst2"]
    assert "metrics" in report["cells"]["icl"]["3"]["sst2"]  # others go on
    assert "nudge failed after 3 edits on sst2: ValueError: at most 1 edits" in screen
    assert "| nudge | 3 | failed |" in (folder / "a.md").read_text()
    Nudge.calls.clear()
    run(backbone, records, out, editors=chosen(fails_after=1))
    assert Nudge.calls == []  # tried, and failed again; what was done is kept
    other, _ = run(backbone, records, out, editors=[Chosen(InContext(), {})])
    assert other["cells"]["nudge"] == report["cells"]["nudge"]  # the mark stays while it is not asked for


def test_each_number_of_edits_is_tried_where_each_is_a_call(
    backbone: Backbone, records: list[EditRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Nudge.terms

    def terms(self: Any, backbone: Any, requests: Any, old: Any) -> Any:
        if len(requests) == 1:
            raise ValueError("not one")
        return plain(self, backbone, requests, old)

    monkeypatch.setattr(Nudge, "terms", terms)
    cells = run(backbone, records, folder / "a.json", counts=[1, 3])[0]["cells"]["nudge"]
    assert cells["1"]["sst2"] == {"error": "ValueError: not one"}
    assert "metrics" in cells["3"]["sst2"]
    cells = run(backbone, records, folder / "b.json", counts=[1, 3], batch=1)[0]["cells"]["nudge"]
    assert cells["1"]["sst2"] == cells["3"]["sst2"] == {"error": "ValueError: not one"}


def test_a_task_that_fails_does_not_end_the_others(
    backbone: Backbone, records: list[EditRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Sst2.judge

    def judge(self: Sst2, example: Any, answer: Any) -> Any:
        if len(told) == 8:  # after the unedited model's
            raise ValueError("too long")
        told.append(0)
        return plain(self, example, answer)

    told: list[int] = []
    monkeypatch.setattr(Sst2, "judge", judge)
    report, _ = run(backbone, records, folder / "a.json", counts=[0, 1], tasks=[task("sst2"), task("nq_open")])
    assert report["cells"]["nudge"]["1"]["sst2"] == {"error": "ValueError: too long"}
    assert "metrics" in report["cells"]["nudge"]["1"]["nq_open"]


def test_a_stopped_run_goes_on(
    backbone: Backbone, records: list[EditRecord], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = folder / "a.json", Nudge.terms

    def terms(self: Any, backbone: Any, requests: Any, old: Any) -> Any:
        if len(requests) == 3:
            raise KeyboardInterrupt
        return plain(self, backbone, requests, old)

    with monkeypatch.context() as patch:
        patch.setattr(Nudge, "terms", terms)
        with pytest.raises(KeyboardInterrupt):
            run(backbone, records, out)
    assert {e: list(by) for e, by in json.loads(out.read_text())["cells"].items()} == {
        "unedited": ["0"],
        "nudge": ["1"],
    }
    Nudge.calls.clear()
    report, _ = run(backbone, records, out)
    assert Nudge.calls == [3]
    assert all("change" in by["sst2"] for by in report["cells"]["nudge"].values())


def test_what_cannot_be_asked_is_refused(backbone: Backbone, records: list[EditRecord], folder: Path) -> None:
    out = folder / "a.json"
    with pytest.raises(ValueError, match="unedited is 0 edits"):
        run(backbone, records, out, editors=[Chosen(Unedited(), {})])
    with pytest.raises(ValueError, match="editors need different names"):
        run(backbone, records, out, editors=chosen() * 2)
    with pytest.raises(ValueError, match="tasks need different names"):
        run(backbone, records, out, tasks=[task("sst2"), task("sst2")])
    with pytest.raises(ValueError, match=r"none of the tasks has its file: no file .*samsum"):
        run(backbone, records, out, tasks=[task("samsum")])
    assert not out.exists()


def test_tasks_by_name_and_with_changes() -> None:
    assert vars(task({"task": "mmlu", "shots": 0, "subjects": ["law"]}, released=True)) == {
        "path": "general/mmlu",
        "shots": 0,
        "subjects": ["law"],
    }
    assert vars(task("rte", released=True))["released"]
    with pytest.raises(ValueError, match=r"no task 'cola'; there are: rte, nq_open"):
        task("cola")
    with pytest.raises(ValueError, match=r"--tasks mmlu: .*shots"):
        task({"task": "mmlu", "shots": "many"})
    with pytest.raises(ValueError, match=r"--tasks lm_eval: .*name"):
        task("lm_eval")
    with pytest.raises(ValueError, match=r"--tasks rte: .*shots"):
        task({"task": "rte", "shots": 1})


def test_lm_evals_tasks_before_and_after_edits(backbone: Backbone, records: list[EditRecord], folder: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    mmlu(folder)
    text_tasks(folder / "tasks")
    chosen_tasks = [{"task": "lm_eval", "name": name, "include": str(folder / "tasks")} for name in ("law", "words")]
    tasks: dict[str, Any] = {"tasks": [*map(task, chosen_tasks), task({"task": "mmlu", "path": str(folder / "mmlu")})]}
    with pytest.raises(ValueError, match="mmlu: law has 3 solved questions"):
        run(backbone, records, folder / "a.json", **tasks)
    tasks["tasks"][-1].shots = 3
    report, _ = run(backbone, records, folder / "a.json", counts=[0, 3], examples=16, **tasks)
    for cells in (report["cells"]["unedited"]["0"], report["cells"]["nudge"]["3"]):
        law, own = cells["lm_eval/law"]["metrics"]["lm_eval/law/acc"], cells["mmlu"]["metrics"]["mmlu/accuracy"]
        assert (law["value"], law["records"]) == (own["value"], own["records"])
    after = report["cells"]["nudge"]["3"]
    before = report["cells"]["unedited"]["0"]["lm_eval/words"]["metrics"]["lm_eval/words/word_perplexity"]
    moved, own = after["lm_eval/law"]["change"]["lm_eval/law/acc"], after["mmlu"]["change"]["mmlu/accuracy"]
    assert moved["value"] == own["value"]
    perplexity = after["lm_eval/words"]["metrics"]["lm_eval/words/word_perplexity"]
    assert perplexity["value"] != before["value"]
    assert after["lm_eval/words"]["change"] == {}
    assert set(report["meta"]["protocols"]) >= {"lm_eval/law/acc", "lm_eval/words/word_perplexity"}
    row = (folder / "a.md").read_text().splitlines()[3]
    assert f"| {perplexity['value']:.1f} [" in row
    Nudge.calls.clear()
    again, screen = run(
        backbone, records, folder / "a.json", counts=[0, 3], examples=16, **tasks | {"tasks": [task(chosen_tasks[0])]}
    )
    assert "2 results" in screen
    assert Nudge.calls == []
    assert again["cells"]["nudge"]["3"]["lm_eval/law"] == after["lm_eval/law"]
    run(backbone, records, folder / "b.json", counts=[0, 3], tasks=[task(chosen_tasks[0] | {"shots": 1})])
    assert Nudge.calls == [3]


def arguments(folder: Path) -> list[str]:
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = json.dumps({"source": "random:llama", "overrides": shape})
    data = '[{"format": "facts", "options": {"split": "test"}, "limit": 6}]'
    return [f"--backbone={backbone}", f"--data={data}", "--examples=5", f"--out={folder / 'a.json'}"]


def test_the_command(folder: Path) -> None:
    nudge = folder / "nudge.yaml"
    nudge.write_text(yaml.safe_dump({"class_path": "deltas.Nudge", "init_args": {"layers": [1]}}))
    given = [*arguments(folder), "--tasks", "sst2", "--tasks", "nq_open"]
    Nudge.calls.clear()
    command(ability_command.ability, [*given, "--editor", str(nudge), "--edits", "0,2"])
    first = json.loads((folder / "a.json").read_text())
    assert Nudge.calls == [2]
    assert set(first["cells"]["nudge"]["2"]) == {"sst2", "nq_open"}
    # more edits: the first two of them are the same records, so only the new number is edited
    command(ability_command.ability, [*given, "--editor", str(nudge), "--edits", "0,2,4"])
    assert Nudge.calls == [2, 4]
    assert json.loads((folder / "a.json").read_text())["cells"]["nudge"]["2"] == first["cells"]["nudge"]["2"]


def test_the_command_refuses_what_does_not_go_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ability_command, "build", None)  # no model may be loaded
    given = arguments(folder)
    for more, message in (
        (["--edits", "0,2"], "give --editor"),
        (["--edits", "0", "--editor", "memit"], "do not go together"),
        (["--edits", "-1", "--editor", "memit"], "0 or more"),
        (["--edits", "7", "--editor", "ft_m"], "only 6 records"),
        (["--edits", "0", "--tasks", "cola"], "no task 'cola'"),
        (["--edits", "0", "--tasks", "samsum"], "none of the tasks has its file: no file .*samsum"),
        (["--edits", "0", "--tasks", "sst2", "--tasks", "sst2"], "tasks need different names"),
        (["--edits", "0,3,4", "--batch", "2", "--editor", "ft_m"], "after 3 edits no batch of 2 ends"),
        (["--edits", "0", "--batch_size", "0"], "--batch_size must be at least 1"),
        (["--edits", "0", f"--out={folder}"], "--out .* is a folder; give a file in it"),
    ):
        with pytest.raises(SystemExit, match=message):
            command(ability_command.ability, [*given, *more])
    assert not (folder / "a.json").exists()
