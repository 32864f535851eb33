"""When a run saves a checkpoint."""

import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from scored_runs import kept, noted, train

from trainers.callbacks.save_checkpoints import SaveCheckpoints

pytestmark = pytest.mark.filterwarnings("ignore")


def test_at_the_end_only(tmp_path: Path) -> None:
    trainer, _, watch = train(tmp_path / "c", 3)
    assert kept(tmp_path / "c") == [3]
    assert [step for step, names in watch.seen if names] == [3]  # saved before the last validation
    assert len(watch.seen) == 7
    assert [type(c) for c in trainer.checkpoint_callbacks] == [SaveCheckpoints]  # and none of Lightning's own
    train(tmp_path / "none", 3, at_end=False)
    assert not (tmp_path / "none").exists()


def test_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    _, _, watch = train(tmp_path, 5, every_n_steps=2)
    assert kept(tmp_path) == [5]
    assert dict(watch.seen) == {step: [f"step{step - step % 2}.ckpt"] if step > 1 else [] for step in range(5)} | {
        5: ["step5.ckpt"]
    }


def test_a_stop_before_the_last_step_saves_too(tmp_path: Path) -> None:
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 3

    train(tmp_path, 10, every_n_steps=2, callbacks=[Stop()])
    assert kept(tmp_path) == [3]


def test_once_a_step_and_never_within_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    real = L.Trainer.save_checkpoint

    def watch(trainer: L.Trainer, path: Path, *args: Any, **kwargs: Any) -> None:
        saved.append((trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx))
        real(trainer, path, *args, **kwargs)

    monkeypatch.setattr(L.Trainer, "save_checkpoint", watch)
    # validations after micro-batches 2, 4, 6 ...: that of 2 is in the middle of a step, and so is that of 4
    train(tmp_path, 4, {0: 9.0, 1: 8.0, 2: 7.0}, 2, every_n_steps=2, monitor="val/score", accumulate_grad_batches=3)
    assert saved == [(2, 5), (4, 11)]
    assert noted(tmp_path) == {"step2.ckpt": 7.0, "step4.ckpt": 0.0}


def test_dev_run_saves_nothing(tmp_path: Path) -> None:
    train(tmp_path / "c", 3, every_n_steps=1, monitor="val/score", fast_dev_run=2)
    assert not (tmp_path / "c").exists()


def test_public_save_is_of_the_current_step_once(tmp_path: Path) -> None:
    returned = []

    class Preempt(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                returned.extend(saves.save(trainer) for saves in trainer.checkpoint_callbacks for _ in range(2))

    train(tmp_path, 3, callbacks=[Preempt()], at_end=False)
    assert returned == [tmp_path / "step2.ckpt"] * 2
    assert kept(tmp_path) == [2]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_exceptions_save_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    class Interrupt(L.Callback):
        def on_before_optimizer_step(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise error

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises((SystemExit, RuntimeError)):
        train(tmp_path / "c", 3, callbacks=[Interrupt()])
    signal.signal(signal.SIGINT, before)
    assert not (tmp_path / "c").exists()
