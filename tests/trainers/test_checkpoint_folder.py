"""Checkpoints on disk: which one is the newest, and damage is named."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FACTS, FILES, flip, save, truncate

from trainers.checkpoints import folder as folder_module
from trainers.checkpoints.folder import (
    MANIFEST,
    CheckpointError,
    digest,
    newest,
    read_manifest,
    seal,
    stage,
    verify,
    whole,
)

DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "delete": (Path.unlink, "missing"),
    "truncate": (truncate, r"\d+ bytes instead of \d+"),
    "flip": (flip, "content changed"),
}


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
