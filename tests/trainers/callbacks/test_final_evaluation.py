"""The evaluation at the end of a run."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from callback_runs import fit, scalars

from datamodules.edits import EditDataModule
from datamodules.records import EditRecord, Query
from modules.editor import Edited
from modules.evaluation import Answers, evaluate
from modules.training_free.icl import InContext
from trainers.callbacks.final_evaluation import FinalEvaluation, drawn_records


def rows(report: dict[str, Any], editor: str) -> dict[str, dict[str, float]]:
    return {n: {k: v["value"] for k, v in cell.items()} for n, cell in report["aggregate"][editor].items()}


def test_final_evaluation_is_written(run):
    report = json.loads((run.folder / "evaluation.json").read_text())
    assert list(report["aggregate"]) == ["unedited", "icl", "icl_right_edit", "incomes (untrained)", "incomes"]
    for name in ("incomes (untrained)", "incomes"):
        assert {n: run["records"] for n, run in report["runs"][name].items()} == {"1": 2, "4": 4}
    assert "facts" in report["meta"]["data"]
    assert rows(report, "unedited")["4"]["locality/token_agreement"] == 1


@pytest.mark.parametrize("train", ["full", "lora"])
def test_final_evaluation_is_that_of_the_trained_editor(train, tmp_path, cache, capsys):
    callback = FinalEvaluation([4], records=4, baselines=False, exact_match=False)
    found = fit(tmp_path, cache, [Disturb(), callback], "hidden", train=train, val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    records, _, available = drawn_records(found.trainer, 4, 0)
    assert report["meta"]["records_available"] == available > 4
    with found.module.original() as backbone:
        originals = Answers(Edited(backbone))
        originals.ask(records)
    direct = evaluate(found.module.editor(), backbone, records, 4, originals=originals)
    assert report["records"]["incomes"]["4"] == direct.records
    assert report["records"]["incomes"]["4"] != report["records"]["incomes (untrained)"]["4"]
    value = direct.aggregates["reliability/token_accuracy"]["value"]
    assert scalars(found.events, "final/reliability_token_accuracy_at_4") == [pytest.approx(value)]
    (info,) = (m for t, m in found.events.summary_metadata.items() if t.endswith("session_start_info"))
    assert b"incomes" in info.plugin_data.content  # the hyperparameters that TensorBoard shows beside the metrics
    assert "Reliability" in capsys.readouterr().out


def test_final_evaluation_leaves_out_what_the_unedited_model_cannot_know(tmp_path, cache, monkeypatch, caplog):
    hard = Query("It rests on", ("this",), conditions=(Query("Nobody knows", ("whether xyzzy is so",)),))
    plain = EditDataModule.test_records

    def conditional(self: Any) -> list[EditRecord]:
        return [replace(r, portability={**r.portability, "hard": (hard,)}) for r in plain(self)]

    monkeypatch.setattr(EditDataModule, "test_records", conditional)
    callback = FinalEvaluation([2], records=2, exact_match=False, baselines=False)
    fit(tmp_path, cache, [callback], val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    for name in ("incomes (untrained)", "incomes"):
        assert len(report["records"][name]["2"]) == 2
        assert not any("hard_acc" in r["post"]["portability"] for r in report["records"][name]["2"])
        assert any(r["post"]["portability"] for r in report["records"][name]["2"])
    assert caplog.text.count("2 questions are left out: the unedited model does not know what they rest on") == 1


class Disturb(L.Callback):
    """Changes what is trained so much that answers change."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        with torch.no_grad():
            for p in pl_module.parameters():
                if p.requires_grad:
                    p += torch.ones_like(p).cumsum(-1).sin()


def test_final_evaluation_of_a_resumed_run_keeps_its_rows(tmp_path, cache):
    first = fit(tmp_path, cache, [FinalEvaluation([2], records=2, exact_match=False)], val_check_interval=4)
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")
    before = json.loads((tmp_path / "evaluation.json").read_text())
    assert before["meta"]["step"] == first.trainer.global_step == 2
    callback = FinalEvaluation([1], records=2, exact_match=False)
    again = fit(tmp_path, cache, [callback], max_steps=3, ckpt_path="last.ckpt")
    after = json.loads((tmp_path / "evaluation.json").read_text())
    assert again.trainer.global_step == 3
    assert list(after["aggregate"]) == list(before["aggregate"])
    assert after["runs"]["incomes (untrained)"] == before["runs"]["incomes (untrained)"]  # the seconds are the same
    assert after["runs"]["incomes"].keys() == {"1"}  # the earlier step's figures are gone
    assert after["meta"]["step"] == 3


def test_a_run_that_was_ended_while_it_evaluated_says_what_is_missing(tmp_path, cache, capsys):
    options = {"exact_match": False, "baselines": False, "pool_1_records": 1}
    first = fit(tmp_path, cache, [FinalEvaluation([1, 2], records=2, **options)], val_check_interval=4)
    first.trainer.save_checkpoint(tmp_path / "last.ckpt")

    def said() -> bool:
        capsys.readouterr()
        fit(tmp_path, cache, [FinalEvaluation([1, 2], records=2, **options)], ckpt_path="last.ckpt")
        return "python -m trainers.evaluate" in capsys.readouterr().out

    assert not said()
    path = tmp_path / "evaluation.json"
    report = json.loads(path.read_text())
    del report["aggregate"]["incomes"]["2"]  # ended between its pool sizes
    path.write_text(json.dumps(report))
    assert said()
    assert json.loads(path.read_text()) == report


def test_final_evaluation_marks_what_fails(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(InContext, "edit", lambda *_: (_ for _ in ()).throw(ValueError("no room")))
    fit(tmp_path, cache, [FinalEvaluation([2], records=2, exact_match=False, before=False)], val_check_interval=4)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    assert report["aggregate"]["icl"]["2"]["error"] == "ValueError: no room"
    assert "incomes (untrained)" not in report["aggregate"]
    assert "reliability/token_accuracy" in report["aggregate"]["incomes"]["2"]


def test_final_evaluation_refuses_before_any_work(tmp_path):
    with pytest.raises(ValueError, match="at least 1"):
        FinalEvaluation([0])
    with pytest.raises(ValueError, match="queries_per_kind must be at least 1, or null to ask all queries; got 0"):
        FinalEvaluation([1], queries_per_kind=0)
    with pytest.raises(TypeError, match="test_records"):
        drawn_records(SimpleNamespace(datamodule=None), 1, 0)  # type: ignore[arg-type]
