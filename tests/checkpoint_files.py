"""Small checkpoints on disk, and damage to them."""

from pathlib import Path

from trainers.checkpoints.folder import (
    digest,
    seal,
    stage,
)

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
