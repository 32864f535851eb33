"""An edit memory as files: memory.json with edits, aliases and the encoder's name, memory.safetensors with vectors."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.records import EditRequest

_VERSION = 1


class Entry(NamedTuple):
    """An edit, and the other names of its subject that came with it."""

    request: EditRequest
    aliases: tuple[str, ...] = ()


class Saved(NamedTuple):
    """What the files hold. Vectors are [edits, d] and of the encoder of that name; None where there are none."""

    entries: list[Entry]
    encoder: str | None
    vectors: Tensor | None


def save(folder: Path, saved: Saved) -> None:
    """Write both files; memory.json alone where there are no vectors."""
    folder.mkdir(parents=True, exist_ok=True)
    edits = [
        {"request": {name: value for name, value in asdict(entry.request).items() if value is not None}}
        | ({"aliases": entry.aliases} if entry.aliases else {})
        for entry in saved.entries
    ]
    tensors = folder / "memory.safetensors"
    if saved.vectors is None:
        tensors.unlink(missing_ok=True)
    else:
        save_file({"vectors": saved.vectors}, tensors, {"statements": _digest(saved.entries)})
    told = {"version": _VERSION, "encoder": saved.encoder if saved.vectors is not None else None, "edits": edits}
    (folder / "memory.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")


def load(folder: Path) -> Saved:
    """Read what `save` wrote.

    Raises:
        ValueError: for a missing or damaged file; it names the file.
    """
    file = folder / "memory.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no edit memory: there is no {file.name}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        version, name = told["version"], told["encoder"]
        entries = [Entry(EditRequest(**e["request"]), tuple(map(str, e.get("aliases", ())))) for e in told["edits"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read: {type(error).__name__} {error}; save the memory again") from error
    if version != _VERSION:
        raise ValueError(f"{file} is of version {version}, not {_VERSION}; save the memory again")
    return Saved(entries, name, None if name is None else _vectors(folder / "memory.safetensors", entries))


def _vectors(file: Path, entries: Sequence[Entry]) -> Tensor:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; save the memory again")
    try:
        with torch.inference_mode(False), safe_open(file, "pt") as opened:
            table, digest = opened.get_tensor("vectors"), (opened.metadata() or {}).get("statements")
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; save the memory again") from error
    if digest != _digest(entries) or table.shape[:1] != (len(entries),):
        raise ValueError(f"{file} holds vectors of other edits than memory.json; save the memory again")
    if not torch.allclose(table.norm(dim=-1), torch.ones(len(table)), atol=1e-3):
        raise ValueError(f"{file} is damaged: vectors are not of length 1; save the memory again")
    return table


def _digest(entries: Sequence[Entry]) -> str:
    """Of the statements in their order: which edits the vectors belong to."""
    digest = sha256()
    for entry in entries:
        digest.update(json.dumps(entry.request.statement).encode())
    return digest.hexdigest()
