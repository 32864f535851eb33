"""Checkpoints of one process, and of DDP: one file in a folder, also where the disk is full."""

import errno
import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import save, truncate

from trainers.checkpoints.folder import (
    MANIFEST,
    CheckpointError,
    verify,
)
from trainers.checkpoints.single import STATE, FolderIO


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
