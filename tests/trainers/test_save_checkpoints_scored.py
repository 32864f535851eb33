"""Which checkpoints a run saves and keeps, by made-up scores."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from scored_runs import SCORED, Named, kept, noted, train

from trainers.callbacks.save_checkpoints import SaveCheckpoints
from trainers.checkpoints.folder import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(("mode", "best"), [("max", [2, 5]), ("min", [3, 6])])
def test_the_newest_and_the_best_are_kept(tmp_path: Path, mode: Any, best: list[int]) -> None:
    _, saves, watch = train(tmp_path, 7, SCORED, every_n_steps=1, monitor="val/score", mode=mode, top_k=2)
    scored = SCORED | {7: 0.0}
    sign = -1 if mode == "max" else 1
    for step, names in watch.seen:
        done = [s for s in range(1, step + 1) if f"step{s}.ckpt" in names]
        assert not step or step in done  # each is saved before its validation
    wanted = sorted(scored, key=lambda s: (sign * scored[s], s))[:2]
    assert saves.best() == [f"step{s}.ckpt" for s in wanted]
    assert kept(tmp_path) == sorted({7, *wanted})
    assert noted(tmp_path) == {f"step{s}.ckpt": scored[s] for s in {7, *wanted}} | (
        {} if 7 in wanted else {"step7.ckpt": 0.0}
    )
    assert mode == "min" or wanted == best


def test_of_equal_scores_the_earlier_stays(tmp_path: Path) -> None:
    train(tmp_path, 4, {1: 0.5, 2: 0.5, 3: 0.5, 4: 0.5}, every_n_steps=1, monitor="val/score")
    assert kept(tmp_path) == [1, 4]


def test_an_equal_score_is_no_reason_to_save(tmp_path: Path) -> None:
    for mode in ("max", "min"):
        folder = tmp_path / mode
        train(folder, 3, {1: 0.5, 2: 0.5, 3: 0.5}, monitor="val/score", mode=mode, at_end=False)
        assert kept(folder) == [1]


def test_a_validation_saves_the_best_also_between_intervals(tmp_path: Path) -> None:
    """Saved at 4 and at the end, validated at 1, 2, 3 ...: the best step is kept wherever it is."""
    _, _, watch = train(tmp_path, 7, SCORED, every_n_steps=4, monitor="val/score")
    assert kept(tmp_path) == [2, 7]
    after = {step: names for step, names in watch.seen if step}
    assert after[3] == ["step2.ckpt"]
    assert after[4] == ["step2.ckpt", "step4.ckpt"]


def test_without_a_score_only_as_the_newest(tmp_path: Path) -> None:
    _, _, watch = train(tmp_path, 5, {3: 0.875}, 3, every_n_steps=1, monitor="val/score")  # validated at 3 only
    assert dict(watch.seen)[2] == ["step2.ckpt"]
    assert kept(tmp_path) == [3, 5]
    assert noted(tmp_path) == {"step3.ckpt": 0.875}


def test_a_score_that_is_no_number_is_none(tmp_path: Path) -> None:
    train(tmp_path, 3, {1: float("nan"), 2: 0.125, 3: float("nan")}, every_n_steps=1, monitor="val/score")
    assert kept(tmp_path) == [2, 3]
    assert noted(tmp_path) == {"step2.ckpt": 0.125}


def test_a_misspelt_monitor_ends_the_first_validation(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.monitor is 'val/scroe'.*there are: val/score"):
        train(tmp_path, 5, monitor="val/scroe", every=2)


def test_a_misspelt_monitor_ends_the_sanity_check_where_the_module_says_what_it_logs(tmp_path: Path) -> None:
    steps: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            steps.append(trainer.global_step)

    with pytest.raises(CheckpointError, match=r"checkpoint.monitor is 'val/scroe'.*there are: val/loss, val/score"):
        train(tmp_path, 2, monitor="val/scroe", module=Named, callbacks=[Count()])
    assert not steps
    for monitor in ("val/loss", "val/score"):  # logged there, or of records that are not there
        train(tmp_path / monitor, 2, monitor=monitor, module=Named)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"top_k": 0, "monitor": "x"}, "top_k"),
        ({"top_k": 2}, "checkpoint.monitor"),
        ({"mode": "most"}, "checkpoint.mode"),
    ],
)
def test_settings_are_refused_early(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        SaveCheckpoints("c", **settings)
