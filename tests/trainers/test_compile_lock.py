"""A lock that a killed compilation has left is told from one that somebody holds."""

import os
import time
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from trainers import fit
from trainers.compile_lock import SHARED_MEMORY, await_lock, folder_of, held, unchanged


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's, as a compilation leaves it when it is killed."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    found = folder_of(SHARED_MEMORY)
    for name in ("lock", "build.ninja", "shm.o"):
        (found / name).touch()
    return found


def aged(folder: Path, seconds: float) -> None:
    then = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))


def never(seconds: float) -> None:
    raise AssertionError("nothing is waited for")


def test_it_is_the_operator_that_deepspeed_compiles(folder: Path) -> None:
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    assert ShareMemCommBuilder.NAME == SHARED_MEMORY
    assert folder.parts[-2:] == ("extensions", SHARED_MEMORY)


def test_a_stale_lock_is_refused_with_the_remedy(folder: Path) -> None:
    aged(folder, 20 * 60)
    with pytest.raises(ValueError, match=rf"nothing beside it has changed for 20 minutes.*rm '{folder}/lock'"):
        await_lock(folder, sleep=never)


def test_a_lock_that_is_held_is_left_to_pytorch(folder: Path) -> None:
    lock = folder / "lock"
    lock.unlink()
    baton = FileBaton(str(lock))
    assert baton.try_acquire()
    aged(folder, 20 * 60)
    assert held(lock)
    await_lock(folder, sleep=never)
    baton.release()
    assert not held(lock)
    await_lock(folder, sleep=never)


def test_a_lock_beside_which_something_changes_is_waited_for(folder: Path) -> None:
    aged(folder, 20 * 60)
    (folder / "shm.o").touch()  # by another machine's compiler
    assert unchanged(folder) < 60
    waited: list[float] = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            (folder / "lock").unlink()

    with pytest.warns(UserWarning, match="waiting for .*lock: no process of this machine holds it") as said:
        await_lock(folder, sleep=sleep)
    assert (len(waited), len(said)) == (3, 1)


def test_the_wait_ends_when_nothing_changes_any_more(folder: Path) -> None:
    with (
        pytest.warns(UserWarning, match="taken for stale in 10 minutes"),
        pytest.raises(ValueError, match="is left from a run that was killed"),
    ):
        await_lock(folder, sleep=lambda _: aged(folder, 11 * 60))


def test_a_run_on_processors_says_so_before_a_process_is_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    aged(folder, 3600)
    monkeypatch.setattr("subprocess.Popen", never)
    arguments = ["--config=incomes_tiny", "--config=zero2_cpu", "--trainer.devices=2", f"--run_dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit) as end:
        fit.main(arguments)
    said = capsys.readouterr().err + str(end.value.code)
    assert f"rm '{folder}/lock'" in said
    assert not (tmp_path / "run").exists()
