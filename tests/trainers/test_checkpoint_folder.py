"""Checkpoints on disk: damage is named, and whatever interrupts a save, what was whole before is still found."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from trainers.checkpoints import folder as folder_module
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
    verify,
    whole,
)
from trainers.checkpoints.single import STATE, FolderIO

FILES = {"latest": b"checkpoint", "checkpoint/rank_0.pt": bytes(range(256)) * 9, "checkpoint/rank_1.pt": b"\0" * 100}
FACTS = {"kind": "zero", "world_size": 2, "stage": 2}


def save(folder: Path, step: int, salt: bytes = b"", name: str | None = None) -> Path:
    path = folder / (name or f"step{step}.ckpt")
    staged = stage(path)
    (staged / "checkpoint").mkdir()
    for file, content in FILES.items():
        (staged / file).write_bytes(content + salt)
    seal(staged, path, digest(staged), {"step": step, **FACTS})
    return path


def flip(file: Path, place: int = -1, bits: int = 0x01) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= bits
    file.write_bytes(content)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "delete": (Path.unlink, "missing"),
    "truncate": (truncate, r"\d+ bytes instead of \d+"),
    "flip": (flip, "content changed"),
}


# ---------------------------------------------------------------- a whole one


def test_a_checkpoint_is_its_files_and_facts(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    manifest = verify(path)
    assert manifest == read_manifest(path)
    assert {k: manifest[k] for k in ("format", "step", *FACTS)} == {"format": 1, "step": 3, **FACTS}
    assert {name: facts["bytes"] for name, facts in manifest["files"].items()} == {n: len(c) for n, c in FILES.items()}
    assert os.listdir(tmp_path) == ["step3.ckpt"]
    assert whole(tmp_path) == [path]
    assert newest(tmp_path) == (path, [])
    (path / "note.txt").write_text("the one for the paper")
    assert verify(path) == manifest


def test_digest_of_named_files_only(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert digest(path, ["latest"]) == {"latest": digest(path)["latest"]}
    assert digest(path)["checkpoint/rank_1.pt"]["sha256"] != digest(path)["latest"]["sha256"]
    with pytest.raises(CheckpointError, match="no_such_file cannot be read"):
        digest(path, ["no_such_file"])


def test_the_newest_is_that_of_the_latest_step(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (9, 100, 10)]
    assert whole(tmp_path) == [paths[1], paths[2], paths[0]]
    assert newest(tmp_path) == (paths[1], [])
    assert newest(tmp_path / "nowhere") == (None, [])


# ---------------------------------------------------------------- the corruption drill


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_damage_is_named(tmp_path: Path, name: str, damage: str) -> None:
    earlier, path = save(tmp_path, 1), save(tmp_path, 2)
    harm, problem = DAMAGES[damage]
    harm(path / name)
    if name == MANIFEST and damage == "truncate":
        problem = "content changed"
    with pytest.raises(CheckpointError, match=f"{path} is damaged: {name}: {problem}$") as error:
        verify(path)
    assert sum(file in str(error.value) for file in [*FILES, MANIFEST]) == 1
    assert (path in whole(tmp_path)) == (damage == "flip" and name != MANIFEST)
    chosen, warnings = newest(tmp_path)
    assert chosen == earlier
    assert len(warnings) == 1
    if (name, damage) == (MANIFEST, "delete"):  # as if it had never been finished
        assert "step2.ckpt" in warnings[0]
    else:
        assert str(path) in warnings[0]
        assert name in warnings[0]
        assert "using step1.ckpt instead" in warnings[0]


def test_no_byte_of_the_manifest_can_change(tmp_path: Path) -> None:
    manifest = save(tmp_path, 1) / MANIFEST
    content = manifest.read_bytes()
    for place in range(len(content)):
        for bits in (0x01, 0x2A, 0xFF):  # 0x2A: a space becomes a line break and back
            flip(manifest, place, bits)
            with pytest.raises(CheckpointError, match=MANIFEST):
                verify(manifest.parent)
            manifest.write_bytes(content)
    assert verify(manifest.parent)["step"] == 1


def test_several_damages_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "step1.ckpt"
    staged = stage(path)
    for i in range(5):
        (staged / f"{i}.pt").write_bytes(b"content")
    seal(staged, path, digest(staged), {"step": 1, **FACTS})
    for i in range(5):
        (path / f"{i}.pt").write_bytes(b"" if i else b"Content")
    with pytest.raises(CheckpointError) as error:
        verify(path)
    assert str(error.value).count("bytes instead of 7") == 3
    assert "2 more files" in str(error.value)


def test_sizes_alone_do_not_see_a_flipped_byte(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    flip(path / "checkpoint" / "rank_0.pt")
    assert newest(tmp_path, hashes=False) == (path, [])
    chosen, (warning,) = newest(tmp_path)
    assert chosen is None
    assert "no whole one" in warning


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / MANIFEST).write_text(folder_module._text(read_manifest(path) | {"format": 2}))
    with pytest.raises(CheckpointError, match=r"manifest.json has format 2.*reads 1"):
        verify(path)


def test_a_single_file_is_of_an_older_version(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"last.ckpt is a single file"):
        verify(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        verify(tmp_path / "step1.ckpt")
    chosen, (warning,) = newest(tmp_path)
    assert chosen is None
    assert "last.ckpt is a single file" in warning


# ---------------------------------------------------------------- interrupted saves


def test_leftovers_are_one_warning_and_are_cleared(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    for step in (2, 3):
        (stage(tmp_path / f"step{step}.ckpt") / "half").write_bytes(b"half")
    (tmp_path / "step4.ckpt").mkdir()
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


# ---------------------------------------------------------------- one file: one process, DDP


def state(step: int) -> dict[str, Any]:
    return {"global_step": step, "state_dict": {"w": torch.full((30_000,), float(step))}}


def test_one_process_saves_and_loads_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step3.ckpt"
    FolderIO().save_checkpoint(state(3), path)
    about = verify(path)
    assert {k: about[k] for k in ("step", "kind", "world_size")} == {"step": 3, "kind": "file", "world_size": 1}
    assert list(about["files"]) == [STATE]
    loaded = FolderIO().load_checkpoint(str(path))
    assert loaded["global_step"] == 3
    assert torch.equal(loaded["state_dict"]["w"], state(3)["state_dict"]["w"])
    FolderIO().remove_checkpoint(path)
    assert os.listdir(path.parent) == []


def test_loading_refuses_what_it_cannot_trust(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"ZeRO on 2 processes.*zero2.yaml.*trainers.export"):
        FolderIO().load_checkpoint(save(tmp_path, 1))
    path = tmp_path / "step2.ckpt"
    FolderIO().save_checkpoint(state(2), path)
    truncate(path / STATE)
    with pytest.raises(CheckpointError, match=r"state.ckpt: \d+ bytes instead of"):
        FolderIO().load_checkpoint(path)
    FolderIO().save_checkpoint({"global_step": 3, "code": print}, path)
    with pytest.raises(CheckpointError, match=r"state.ckpt cannot be read"):
        FolderIO().load_checkpoint(path, weights_only=False)


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may grow beyond 64 KiB: torch's own writer meets it, as it would a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def raising(target: Any, name: str, error: Exception) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, fail)
        yield


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (full_disk, "inline_container"),
        (lambda: raising(torch, "save", RuntimeError("[enforce fail] file write failed\nframe 0")), "write failed ("),
        (lambda: raising(torch, "save", NO_SPACE), "No space left on device"),
        (lambda: raising(os, "fsync", NO_SPACE), "No space left on device"),
        (lambda: raising(os, "mkdir", NO_SPACE), "No space left on device"),
        (lambda: raising(os, "rename", NO_SPACE), "No space left on device"),
    ],
    ids=["torch's writer", "RuntimeError", "torch.save", "fsync", "mkdir", "rename"],
)
def test_a_full_disk_is_said_with_the_path_and_harms_nothing(tmp_path: Path, trouble: Any, reason: str) -> None:
    FolderIO().save_checkpoint(state(1), tmp_path / "step1.ckpt")
    before = verify(tmp_path / "step1.ckpt")
    with trouble(), pytest.raises(CheckpointError) as error:
        FolderIO().save_checkpoint(state(2), tmp_path / "step2.ckpt")
    said = str(error.value)
    assert str(tmp_path / "step2.ckpt") in said
    assert reason in said
    assert "step1.ckpt is intact" in said
    assert "GiB are free there" in said
    assert "\n" not in said
    assert verify(tmp_path / "step1.ckpt") == before
    assert os.listdir(tmp_path) == ["step1.ckpt"]


def test_an_interrupted_save_leaves_no_partial(tmp_path: Path) -> None:
    with raising(torch, "save", TypeError("cannot pickle")), pytest.raises(TypeError, match="cannot pickle"):
        FolderIO().save_checkpoint(state(1), tmp_path / "step1.ckpt")
    assert os.listdir(tmp_path) == []


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    FolderIO().save_checkpoint(state(5), tmp_path / "step5.ckpt")
    manifest = json.loads((tmp_path / "step5.ckpt" / MANIFEST).read_text(encoding="utf-8"))
    assert list(manifest) == ["format", "step", "kind", "world_size", "files", "sha256"]
