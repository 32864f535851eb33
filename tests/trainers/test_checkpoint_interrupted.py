"""Whatever interrupts a save, what was whole before is still found."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FACTS, FILES, save

from trainers.checkpoints.folder import (
    MANIFEST,
    CheckpointError,
    clear_partials,
    digest,
    newest,
    partial,
    read_manifest,
    remove,
    seal,
    stage,
)


def test_leftovers_are_one_warning_and_are_cleared(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for step in (2, 3):
        (stage(tmp_path / f"step{step}.ckpt") / "half").write_bytes(b"half")
    (tmp_path / "step4.ckpt").mkdir()
    (tmp_path / ".step1.ckpt.universal" / "zero").mkdir(parents=True)  # of a conversion to another number of ranks
    chosen, (warning,) = newest(tmp_path)
    assert chosen == path
    assert all(name in warning for name in (".step2.ckpt.partial", ".step3.ckpt.partial", "step4.ckpt"))
    clear_partials(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step1.ckpt", "step4.ckpt"]


def test_an_earlier_attempt_leaves_nothing_in_the_next(tmp_path: Path) -> None:
    (stage(tmp_path / "step1.ckpt") / "stale").write_bytes(b"stale")
    path = save(tmp_path, 1)
    assert set(read_manifest(path)["files"]) == set(FILES)
    assert not (path / "stale").exists()


class Killed(BaseException):
    """The process ends here."""


@contextmanager
def killed_at(count: int) -> Iterator[list[str]]:
    """The process ends before the count-th call that changes the disk for good; the calls until then."""
    calls: list[str] = []

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) == count:
                raise Killed
            calls.append(name)
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield calls


@pytest.mark.parametrize("step", [2, 1], ids=["another step", "the same step again"])
def test_killed_at_any_moment_there_is_a_whole_one(tmp_path: Path, step: int) -> None:
    """Before every single change on disk of a save: the old one counts, or the new one does."""
    found = []
    for count in range(1000):
        place = tmp_path / str(count)
        save(place, 1)
        try:
            with killed_at(count) as calls:
                save(place, step, salt=b"new")
        except Killed:
            chosen, _ = newest(place)
            assert chosen is not None, calls
            found.append((chosen / "latest").read_bytes() == b"checkpointnew")
            clear_partials(place)
            assert newest(place) == (chosen, [])
        else:
            break
    assert {"fsync", "rename", "replace", "mkdir"} <= set(calls)
    assert found == sorted(found)  # first the old one, from some moment on the new one
    assert not found[0]
    assert newest(place) == (place / f"step{step}.ckpt", [])
    assert set(os.listdir(place)) == {"step1.ckpt", f"step{step}.ckpt"}


def test_the_manifest_is_the_last_file_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def watch(opened: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{opened}"))
        real(opened)

    monkeypatch.setattr(os, "fsync", watch)
    path = save(tmp_path, 1)
    staged = str(partial(path))
    assert set(synced[:3]) == {f"{staged}/{name}" for name in FILES}
    assert MANIFEST in synced[3]
    assert set(synced[4:-1]) == {staged, f"{staged}/checkpoint"}
    assert synced[-1] == str(tmp_path)


def test_a_file_that_is_not_as_it_was_digested_is_not_sealed(tmp_path: Path) -> None:
    path = tmp_path / "step1.ckpt"
    staged = stage(path)
    (staged / "rank_0.pt").write_bytes(b"content")
    files = digest(staged)
    with pytest.raises(CheckpointError, match=r"rank_0.pt has 7 bytes instead of 8"):
        seal(staged, path, {"rank_0.pt": files["rank_0.pt"] | {"bytes": 8}}, {"step": 1, **FACTS})
    with pytest.raises(CheckpointError, match=r"step1.ckpt: No such file"):
        seal(staged, path, files | {"rank_1.pt": files["rank_0.pt"]}, {"step": 1, **FACTS})
    assert not path.exists()


def test_an_interrupted_removal_leaves_nothing_that_looks_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path, 1)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    warning = remove(path)
    assert warning is not None
    assert str(path) in warning
    assert "Permission denied" in warning
    monkeypatch.undo()
    assert not path.exists()
    assert newest(tmp_path) == (None, [])
    clear_partials(tmp_path)
    assert os.listdir(tmp_path) == []
    assert remove(path) is None


SLOW = """
import sys, time
from pathlib import Path
from trainers.checkpoints.folder import stage
staged = stage(Path(sys.argv[1]))
(staged / "rank_0.pt").write_bytes(b"half")
print("writing", flush=True)
time.sleep(60)
"""


def test_killed_while_saving(tmp_path: Path) -> None:
    earlier = save(tmp_path, 1)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, str(tmp_path / "step2.ckpt")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert partial(tmp_path / "step2.ckpt").is_dir()
    chosen, warnings = newest(tmp_path)
    assert chosen == earlier
    assert len(warnings) == 1
