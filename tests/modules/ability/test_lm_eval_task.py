"""lm-eval's tasks as tasks of general ability: the same questions, prompts and scores, and no stranger's code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval_files import ACC, mmlu, questions, task_file, text_tasks

from modules.ability import TASKS, lm_eval_files
from modules.ability.lm_eval_task import LmEval
from modules.ability.measure import change, measure
from modules.ability.mmlu import Mmlu
from modules.ability.task import drawn
from modules.asked import question_of
from modules.backbone import Backbone
from modules.editor import Edited
from modules.training_free import GRACE, RAG, MeLLo
from modules.training_free.icl import InContext


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm_eval_files, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[lm-eval\]'"):
        TASKS["lm_eval"](name="mmlu")


@pytest.fixture
def lm_eval() -> Any:
    return pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")


@pytest.fixture
def folder(lm_eval: Any, tmp_path: Path) -> Path:
    mmlu(tmp_path)
    text_tasks(tmp_path / "tasks")
    return tmp_path


def task(folder: Path, name: str, **options: Any) -> LmEval:
    return LmEval(name=name, include=str(folder / "tasks"), **options)


@pytest.mark.parametrize("shots", [0, 3])
def test_mmlu_is_our_own_reading_of_the_same_records(
    shots: int, folder: Path, lm_eval: Any, tiny: Callable[..., Backbone]
) -> None:
    if not shots:
        file = folder / "tasks" / "law.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"num_fewshot": None}))
    backbone, theirs, own = tiny(), task(folder, "law", shots=shots), Mmlu(str(folder / "mmlu"), shots=shots)
    asked, passed_over = drawn(theirs, backbone)
    known = {example.id: example for example in drawn(own, backbone)[0]}
    assert (len(asked), passed_over) == (16, 0)
    same = [known[example.id] for example in asked]
    assert [e.prompt for e in asked] == [e.prompt for e in same]
    assert [e.options[0] for e in asked] == [" A"] * 16
    found, ours = (measure(Edited(backbone), t, e) for t, e in ((theirs, asked), (own, same)))
    assert found["metrics"]["lm_eval/law/acc"] == ours["metrics"]["mmlu/accuracy"]
    contexts = {request.args[0] for example in asked for request in theirs._requests[example.id]}
    assert {question_of(c) for c in contexts} == {question_of(e.prompt) for e in same}  # not the solved ones before it
    assert not contexts & {question_of(c) for c in contexts}
    for one, other in zip(found["examples"], ours["examples"], strict=True):
        sums = [total for total, _ in one["responses"]]
        assert "ABCD"[sums.index(max(sums))] == other["choice"]
    assert len({e["choice"] for e in ours["examples"]}) > 1  # else a constant would pass
    assert f"lm-eval {lm_eval.__version__}" in theirs.protocols[theirs.main]
    assert f"law (version 1.0, {shots} shots)" in theirs.protocols[theirs.main]


def test_scores_are_those_that_lm_eval_gives(folder: Path, lm_eval: Any, tiny: Callable[..., Backbone]) -> None:
    from lm_eval.tasks import TaskManager

    from modules.ability.lm_eval_model import EditedLM

    edited = Edited(tiny())
    manager = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)
    names = ["law", "words", "writes"]
    tasks = manager.load(names)
    for one in tasks["tasks"].values():
        one.set_fewshot_seed(1234)
    theirs = lm_eval.evaluate(EditedLM(edited), tasks, bootstrap_iters=0, log_samples=False)["results"]
    for name in names:
        one = task(folder, name)
        found = measure(edited, one, drawn(one, edited.backbone)[0])["metrics"]
        assert found
        for metric, value in found.items():
            assert value["value"] == pytest.approx(theirs[name][f"{metric.rpartition('/')[2]},none"])
            assert value["ci"][0] <= value["value"] <= value["ci"][1]


def test_what_is_no_mean_has_no_change(folder: Path, tiny: Callable[..., Backbone]) -> None:
    one = task(folder, "words", metric="bits_per_byte")
    found = measure(Edited(tiny()), one, drawn(one, tiny())[0])
    assert (one.main, one.percent) == ("lm_eval/words/bits_per_byte", False)
    assert set(found["metrics"]) == {"lm_eval/words/bits_per_byte", "lm_eval/words/word_perplexity"}
    assert change(found, found) == {}
    law = task(folder, "law")
    law.examples()
    assert law.percent
    with pytest.raises(ValueError, match="no metric 'acc'; there are: word_perplexity, bits_per_byte"):
        task(folder, "words", metric="acc").examples()


def test_a_group_is_all_its_questions(folder: Path, tiny: Callable[..., Backbone]) -> None:
    names = ["law", "ethics"]
    config = yaml.safe_load((folder / "tasks" / "law.yaml").read_text()) | {"fewshot_split": None, "num_fewshot": None}
    kept = {k: config[k] for k in ("output_type", "doc_to_text", "doc_to_choice", "doc_to_target")}
    task_file(folder / "tasks", "ethics", {"test": questions("other", 4)}, metric_list=ACC, **kept)
    (folder / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "subjects", "task": names}))
    one, backbone = task(folder, "subjects"), tiny()
    asked, _ = drawn(one, backbone)
    assert sorted(e.id for e in asked) == sorted([*(f"law/{i}" for i in range(16)), *(f"ethics/{i}" for i in range(4))])
    found = measure(Edited(backbone), one, asked)
    values = [e["values"]["lm_eval/subjects/acc"] for e in found["examples"]]
    assert found["metrics"]["lm_eval/subjects/acc"]["value"] == pytest.approx(sum(values) / 20)
    (folder / "tasks" / "all.yaml").write_text(yaml.safe_dump({"group": "mixed", "task": ["law", "words"]}))
    lm_eval_files._manager.cache_clear()
    with pytest.raises(ValueError, match="word_perplexity is no mean"):
        task(folder, "mixed").examples()


def test_what_does_not_go_together_is_refused(folder: Path) -> None:
    words, law = task(folder, "words"), task(folder, "law")
    for one in (words, law):
        one.examples()
        one.check(InContext())
        with pytest.raises(ValueError, match="mello works one question through"):
            one.check(MeLLo())
    for editor in (RAG(), GRACE()):
        law.check(editor)
        with pytest.raises(ValueError, match=f"{editor.name} goes by the prompt"):
            words.check(editor)
    with pytest.raises(ValueError, match="shots must not be negative"):
        task(folder, "law", shots=-1)


def test_names_and_data_that_are_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = lm_eval_files._manager
    monkeypatch.setattr(lm_eval_files, "_manager", lambda include, shipped: own(str(folder / "tasks"), False))
    with pytest.raises(ValueError, match=r"no task 'lawn'; did you mean law\?"):
        task(folder, "lawn").examples()
    with pytest.raises(FileNotFoundError, match="no file"):
        LmEval(name="law", include=str(folder / "nowhere")).examples()
    for file in (folder / "tasks").glob("law_*.json"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="the data of law cannot be had"):
        task(folder, "law").examples()


@pytest.fixture
def ran(folder: Path) -> Path:
    """Is there once a stranger's code ran."""
    return folder / "ran"


def changed(folder: Path, **config: Any) -> Path:
    file = folder / "tasks" / "law.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | config))
    return file


def test_python_of_a_task_file_runs_only_if_trusted(folder: Path, ran: Path) -> None:
    (folder / "tasks" / "utils.py").write_text(f"open({str(ran)!r}, 'w')\ndef docs(d):\n    return d\n")
    (folder / "base").write_text("process_docs: !function tasks/utils.docs\n")
    file = changed(folder, include="../base")
    with pytest.raises(ValueError, match=r"base names Python code .*trust_remote_code: true"):
        task(folder, "law").examples()
    file.write_text(file.read_text().replace("include: ../base", "process_docs: !function utils.docs"))
    with pytest.raises(ValueError, match=r"law.yaml names Python code"):
        task(folder, "law").examples()
    assert not ran.exists()
    assert len(task(folder, "law", trust_remote_code=True).examples()) == 16
    assert ran.exists()


def test_a_template_does_not_reach_python(folder: Path, ran: Path) -> None:
    changed(folder, doc_to_text="{{ cycler.__init__.__globals__.os.mkdir('" + str(ran) + "') }}{{question}}")
    with pytest.raises(Exception, match="unsafe"):
        task(folder, "law").examples()
    assert not ran.exists()
    changed(folder, doc_to_text="{{question}}", process_results=None)
    assert len(task(folder, "law").examples()) == 16


def test_metrics_of_the_hub_and_programs_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    loaded: list[str] = []
    monkeypatch.setattr(evaluate, "load", lambda name: loaded.append(name))
    metric = {"metric": "strange", "hf_evaluate": True, "aggregation": "mean", "higher_is_better": True}
    changed(folder, metric_list=[metric])
    with pytest.raises(ValueError, match="'strange' is a script of the hub; trust_remote_code"):
        task(folder, "law").examples()
    assert loaded == []
    changed(folder, metric_list=ACC, unsafe_code=True)
    with pytest.raises(ValueError, match="law runs programs that the model writes"):
        task(folder, "law").examples()
