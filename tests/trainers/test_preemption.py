"""A signal: the step is finished, a checkpoint saved, the exit code says so, and the resumed run is the uninterrupted
one."""

import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trainers.checkpoints.zero  # noqa: F401 (says what loading may build)
from tests.trainers import signalling
from tests.trainers.signalling import DDP, RUN, ZERO, SignalAt, run, signal_at
from trainers.callbacks import preemption
from trainers.callbacks.preemption import Preemption, exit_code
from trainers.callbacks.save_checkpoints import SaveCheckpoints
from trainers.checkpoints.folder import whole
from trainers.checkpoints.single import FolderIO
from trainers.fit import main

pytestmark = pytest.mark.filterwarnings("ignore")


class Model(BoringModel):
    """Logs the number of each micro-batch."""

    ended = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/batch", float(batch_idx))
        return super().training_step(batch, batch_idx)

    def on_train_end(self) -> None:
        self.ended = True


class Do(L.Callback):
    """Does something in a hook, once."""

    def __init__(self, hook: str, act: Any) -> None:
        def once(*args: Any) -> None:
            if not self.done:
                self.done = True
                act(*args)

        self.done = False
        setattr(self, hook, once)


class Late(L.Callback):
    """Sees which micro-batches are ended, though it stands behind `Preemption` in the list."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append(batch_idx)


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def fit(folder: Path, *callbacks: L.Callback, steps: int = 4, **options: Any) -> Model:
    """Four steps of two micro-batches. The handlers are always left as they were."""
    model, before = Model(), handlers()
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=2,
        limit_train_batches=8,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=TensorBoardLogger(str(folder), name="", version="logs"),
        plugins=[FolderIO()],
        callbacks=[Preemption(), SaveCheckpoints(str(folder)), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    try:
        trainer.fit(model)
    finally:
        assert handlers() == before
    return model


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_step_is_finished_saved_and_logged(name: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    late = Late()
    middle = Do("on_train_batch_start", lambda *_: os.kill(os.getpid(), signal.Signals[name]))
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, middle, late, val_check_interval=2, num_sanity_val_steps=0)
    assert end.value.code == 143
    assert late.seen == [0, 1]  # the first step's second micro-batch, to its end, and nothing after it
    assert [path.name for path in whole(tmp_path)] == ["step1.ckpt"]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{name}: saved {tmp_path / 'step1.ckpt'}; go on with --ckpt_path last")
    logged = EventAccumulator(str(tmp_path / "logs")).Reload()
    assert [event.value for event in logged.Scalars("train/batch")] == [1.0]  # as an uninterrupted run logs it


def test_no_signal_no_end(tmp_path: Path) -> None:
    assert fit(tmp_path).ended


def test_signal_in_a_validation_waits_for_a_step(tmp_path: Path) -> None:
    during = Do("on_validation_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit):
        fit(tmp_path, during, val_check_interval=4, num_sanity_val_steps=0)
    assert [path.name for path in whole(tmp_path)] == ["step3.ckpt"]


@pytest.mark.parametrize("limit", [{"steps": 4}, {"steps": -1, "max_epochs": 1}])
def test_signal_in_the_last_step_lets_the_run_end(limit: dict[str, int], tmp_path: Path) -> None:
    last = SignalAt(3)
    seen: list[str] = []
    final = Do("on_train_end", lambda *_: seen.extend(path.name for path in whole(tmp_path)))
    assert fit(tmp_path, last, final, **limit).ended
    assert seen == ["step4.ckpt"]  # safe before what comes at the end of the training


def test_before_training_a_signal_does_what_it_does_by_default(tmp_path: Path) -> None:
    """Lightning's handlers, which communicate, are never there."""
    seen: list[Any] = []
    before = handlers()
    fit(tmp_path, Do("on_sanity_check_start", lambda *_: seen.extend(handlers())))
    assert seen == before


def test_second_signal_does_what_it_does_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(preemption, "REPEAT", 0.0)
    before = signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(number))

    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        assert calls == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert calls == [signal.SIGUSR1]

    try:
        with pytest.raises(SystemExit):
            fit(tmp_path, Do("on_train_batch_start", twice))
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert calls == [signal.SIGUSR1]


def test_signal_that_comes_twice_at_once_is_one(tmp_path: Path) -> None:
    """As when a launcher passes on what the process has got already; the second would kill this test."""
    twice = Do("on_train_batch_start", lambda *_: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, twice)
    assert end.value.code == 143


def test_errors_leave_the_handlers_as_they_were(tmp_path: Path) -> None:
    def fail(*_: Any) -> None:
        assert handlers()[0] != signal.SIG_DFL
        raise RuntimeError("a step fails")

    with pytest.raises(RuntimeError, match="a step fails"):
        fit(tmp_path, Do("on_train_batch_start", fail))


def test_trains_in_a_thread(tmp_path: Path) -> None:
    """Where Python allows no handlers."""
    ended: list[bool] = []
    thread = threading.Thread(target=lambda: ended.append(fit(tmp_path).ended))
    thread.start()
    thread.join()
    assert ended == [True]


@pytest.mark.parametrize(
    ("launcher", "local_rank", "code"),
    [(LightningEnvironment, 0, 143), (LightningEnvironment, 1, 0), (TorchElasticEnvironment, 1, 143)],
)
def test_rank_that_lightning_started_ends_with_0(launcher: type, local_rank: int, code: int) -> None:
    """Lightning kills the first rank for any other code of theirs."""
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(cluster_environment=launcher()), local_rank=local_rank)
    assert exit_code(trainer) == code


def test_wrong_settings_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preemption\.signals.*SIGNOTHING"):
        Preemption(["SIGNOTHING"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="SaveCheckpoints"):
        L.Trainer(accelerator="cpu", callbacks=[Preemption()], logger=False, default_root_dir=tmp_path).fit(Model())


# --------------------------------------------------------------------------------------- the command, in processes


def test_signal_to_all_processes_of_a_run_leaves_the_loaders_workers(tmp_path: Path) -> None:
    """As SLURM sends it. A worker that dies would end the run with an error."""
    group = ["--data.init_args.num_workers=2", *signal_at(1, name="SIGUSR1", group="true")]
    ended = run(
        *("setsid", "-w", sys.executable, "-m", "trainers.fit"),
        *(*RUN, f"--run_dir={tmp_path}", "--trainer.max_steps=4", *group),
    )
    assert ended.returncode == 143, ended.stderr
    assert [path.name for path in whole(tmp_path / "checkpoints")] == ["step2.ckpt"]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the checkpoint of the fourth step."""
    found = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict | list | tuple):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                walk(f"{name}/{key}", part)

    saved = folder / "checkpoints" / "step4.ckpt"
    for file in sorted([*saved.glob("state.ckpt"), *saved.glob("checkpoint/*.pt")]):
        walk(file.name, torch.load(file, weights_only=True))
    return found


@pytest.mark.parametrize("ranks", [(), DDP, ZERO], ids=["one process", "two that Lightning starts", "two under ZeRO"])
def test_preempted_and_resumed_run_is_the_uninterrupted_one(ranks: tuple[str, ...], tmp_path: Path) -> None:
    def arguments(folder: str, *more: str) -> list[str]:
        return [*RUN, *ranks, f"--run_dir={tmp_path / folder}", "--trainer.max_steps=4", *more]

    any_rank = signal_at(1, rank=len(ranks) and 1)
    ended = run(sys.executable, "-m", "trainers.fit", *arguments("part", *any_rank))
    assert ended.returncode == 143, ended.stderr
    assert "SIGTERM: saved" in ended.stdout
    assert "Traceback" not in ended.stderr
    assert [path.name for path in whole(tmp_path / "part" / "checkpoints")] == ["step2.ckpt"]
    if ranks:
        script = Path(signalling.__file__)
        both = run(sys.executable, script, *arguments("whole"), "--", *arguments("part", "--ckpt_path=last"))
        assert both.returncode == 0, both.stderr
    else:
        main(arguments("whole"))
        main(arguments("part", "--ckpt_path=last"))
    one, other = state(tmp_path / "whole"), state(tmp_path / "part")
    assert one.keys() == other.keys()
    assert len(one) > 10
    assert all(torch.equal(one[name], other[name]) for name in one)
