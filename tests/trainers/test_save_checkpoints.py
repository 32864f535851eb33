"""Which checkpoints a run saves and keeps, by made-up scores; and that no old one goes before its time."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from trainers import fit
from trainers.callbacks.save_checkpoints import SCORES, SaveCheckpoints
from trainers.checkpoints.folder import CheckpointError, newest, remove, stage, verify, whole
from trainers.checkpoints.single import FolderIO

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.filterwarnings("ignore")


class Scored(L.LightningModule):
    """One weight, and a score for each validation by the step it comes at."""

    def __init__(self, scores: dict[int, float] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.made_up = scores or {}

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        return (self.weight - batch[0]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        if not self.trainer.sanity_checking:  # on a part of the data, not every metric need have a value
            self.log("val/score", self.made_up.get(self.global_step, 0.0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Watch(L.Callback):
    """What lies in the folder after every step, before and after its validation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: list[tuple[int, list[str]]] = []

    def look(self, trainer: L.Trainer) -> None:
        self.seen.append((trainer.global_step, sorted(p.name for p in whole(self.folder))))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)

    def on_validation_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.look(trainer)


def train(
    folder: Path,
    steps: int,
    scores: dict[int, float] | None = None,
    every: int = 1,
    resume: Path | None = None,
    **how: Any,
) -> tuple[L.Trainer, SaveCheckpoints, Watch]:
    """A run of so many steps, with a validation every `every` micro-batches; `how`: of SaveCheckpoints or Trainer."""
    loader = DataLoader(TensorDataset(torch.arange(100.0)[:, None]))
    own = {k: how.pop(k) for k in ("every_n_steps", "monitor", "mode", "top_k", "at_end") if k in how}
    saves, watch = SaveCheckpoints(str(folder), **own), Watch(folder)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        plugins=[FolderIO()],
        callbacks=[watch, saves, *how.pop("callbacks", [])],
        logger=False,
        max_steps=steps,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        default_root_dir=folder.parent,
        **how,
    )
    trainer.fit(Scored(scores), loader, DataLoader(TensorDataset(torch.zeros(1, 1))), ckpt_path=resume)
    return trainer, saves, watch


def kept(folder: Path) -> list[int]:
    """Steps of what lies in the folder."""
    return sorted(verify(path)["step"] for path in folder.glob("*.ckpt"))


def noted(folder: Path) -> dict[str, float]:
    return json.loads((folder / SCORES).read_text(encoding="utf-8"))


# ---------------------------------------------------------------- when


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


# ---------------------------------------------------------------- which


SCORED = {1: 0.5, 2: 0.875, 3: 0.125, 4: 0.75, 5: 0.875, 6: 0.25}


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


# ---------------------------------------------------------------- going on


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


class Preempt(L.Callback):
    """Has every step saved before it is made."""

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        for saves in trainer.checkpoint_callbacks:
            assert isinstance(saves, SaveCheckpoints)
            saves.save(trainer)


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


# ---------------------------------------------------------------- what must not be lost


def test_a_failed_save_ends_the_run_and_takes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = torch.save, []

    def full(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"step3.ckpt: No space left.*step2.ckpt is intact"):
        train(tmp_path, 5, SCORED, every_n_steps=1, monitor="val/score", mode="min")
    assert kept(tmp_path) == [1, 2]
    assert not list(tmp_path.glob(".*"))


def test_the_old_one_goes_after_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.callbacks import save_checkpoints

    real, there = save_checkpoints.remove, []

    def watch(path: Path) -> str | None:
        there.append((path.name, [p.name for p in whole(tmp_path)]))
        return real(path)

    monkeypatch.setattr(save_checkpoints, "remove", watch)
    train(tmp_path, 3, every_n_steps=1)
    assert there == [("step1.ckpt", ["step2.ckpt", "step1.ckpt"]), ("step2.ckpt", ["step3.ckpt", "step2.ckpt"])]


def test_a_failed_removal_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainers.callbacks import save_checkpoints

    monkeypatch.setattr(save_checkpoints, "remove", lambda path: f"could not remove {path}")
    with pytest.warns(UserWarning, match=r"could not remove .*step1.ckpt"):
        train(tmp_path, 2, every_n_steps=1)
    assert kept(tmp_path) == [1, 2]


SLOW_FIT = """
import sys, time
import torch
from trainers import fit
real, calls = torch.save, []
def slow(value, file):
    real(value, file)
    calls.append(1)
    if len(calls) == 2:
        print("saving", flush=True)
        time.sleep(60)
torch.save = slow
fit.main(sys.argv[1:])
"""


def test_a_run_that_is_killed_while_it_saves_goes_on(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--config=incomes_tiny", f"--run_dir={tmp_path}", "--checkpoint.every_n_steps=1"]
    options += ["--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0", "--trainer.enable_model_summary=false"]
    options += ["--trainer.enable_progress_bar=false", "--ckpt_path=last"]
    with subprocess.Popen([sys.executable, "-c", SLOW_FIT, *options], stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert any(line == b"saving\n" for line in process.stdout)
        process.send_signal(signal.SIGKILL)
    folder = tmp_path / "checkpoints"
    assert (folder / ".step2.ckpt.partial" / "state.ckpt").is_file()
    chosen, warnings = newest(folder)
    assert chosen == folder / "step1.ckpt"
    assert len(warnings) == 1
    capfd.readouterr()
    fit.main(options)
    said = capfd.readouterr()
    assert said.err.count(".step2.ckpt.partial") == 1
    assert f"continuing from {chosen}" in said.out
    assert os.listdir(folder) == ["step3.ckpt"]
