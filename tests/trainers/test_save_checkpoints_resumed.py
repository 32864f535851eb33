"""Checkpoints of a run that goes on from one."""

from pathlib import Path

import pytest
from scored_runs import SCORED, Preempt, kept, noted, train

from trainers.callbacks.save_checkpoints import SCORES
from trainers.checkpoints.folder import remove, stage

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_resumed_run_goes_on_with_what_is_there(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    train(folder, 4, SCORED, every_n_steps=2, monitor="val/score")
    assert kept(folder) == [2, 4]
    (stage(folder / "step9.ckpt") / "half").write_bytes(b"half")
    _, saves, watch = train(folder, 6, SCORED, every_n_steps=2, monitor="val/score", resume=folder / "step4.ckpt")
    assert watch.seen[0] == (4, ["step2.ckpt", "step4.ckpt"])
    assert kept(folder) == [2, 6]  # 5 is as good as 2, and later
    assert noted(folder) == {"step2.ckpt": 0.875, "step6.ckpt": 0.25}
    assert not list(folder.glob(".*"))
    assert saves.names == ["step2.ckpt", "step6.ckpt"]


def test_what_is_gone_no_longer_counts(tmp_path: Path) -> None:
    train(tmp_path, 4, SCORED, every_n_steps=2, monitor="val/score")
    remove(tmp_path / "step2.ckpt")
    _, saves, _ = train(tmp_path, 6, SCORED, every_n_steps=6, monitor="val/score", resume=tmp_path / "step4.ckpt")
    assert kept(tmp_path) == [5, 6]
    assert saves.best() == ["step5.ckpt"]


def test_a_step_that_is_made_again_has_no_score_of_before(tmp_path: Path) -> None:
    train(tmp_path, 3, SCORED, every_n_steps=1, monitor="val/score", top_k=3)
    train(tmp_path, 2, SCORED, 100, every_n_steps=1, monitor="val/score", top_k=3, resume=tmp_path / "step1.ckpt")
    assert noted(tmp_path) == {"step1.ckpt": 0.5, "step3.ckpt": 0.125}
    assert kept(tmp_path) == [1, 2, 3]


def test_going_on_from_another_folder(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    train(one, 3)
    _, _, watch = train(two, 4, resume=one / "step3.ckpt", every_n_steps=3, accumulate_grad_batches=3)
    assert {step: names for step, names in watch.seen if names} == {4: ["step4.ckpt"]}  # none within a step
    train(three, 4, resume=one / "step3.ckpt", callbacks=[Preempt()], at_end=False)
    assert kept(three) == [3]


def test_the_step_that_a_run_goes_on_from_is_not_saved_again(tmp_path: Path) -> None:
    train(tmp_path, 2)
    before = (tmp_path / "step2.ckpt" / "manifest.json").stat().st_mtime_ns
    train(tmp_path, 2, resume=tmp_path / "step2.ckpt")
    train(tmp_path, 3, resume=tmp_path / "step2.ckpt", callbacks=[Preempt()], at_end=False)
    assert kept(tmp_path) == [2]
    assert (tmp_path / "step2.ckpt" / "manifest.json").stat().st_mtime_ns == before


def test_another_monitor_leaves_the_earlier_ones_alone(tmp_path: Path) -> None:
    train(tmp_path, 4, SCORED, every_n_steps=2, monitor="val/score")
    with pytest.warns(UserWarning, match="cannot be compared"):
        train(tmp_path, 6, SCORED, every_n_steps=2, monitor="val/score", mode="min", resume=tmp_path / "step4.ckpt")
    assert kept(tmp_path) == [2, 4, 6]
    assert noted(tmp_path) == {"step6.ckpt": 0.25}


def test_damaged_scores_do_not_stop_a_run(tmp_path: Path) -> None:
    train(tmp_path, 2, SCORED, every_n_steps=2, monitor="val/score")
    for content in ("{", "[1]", '{"step2.ckpt": null}'):
        (tmp_path / SCORES).write_text(content, encoding="utf-8")
        _, saves, _ = train(tmp_path, 3, SCORED, monitor="val/score", resume=tmp_path / "step2.ckpt", at_end=False)
        assert saves.scores == {"step3.ckpt": 0.125}
        (tmp_path / "step2.ckpt").exists() or train(tmp_path, 2, SCORED, every_n_steps=2, monitor="val/score")
