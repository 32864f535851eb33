"""An edit memory as files: memory.json with edits, aliases and the encoder's name, memory.safetensors with vectors."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from datamodules.records import EditRequest
from modules.memory.encoder import Encoder
from modules.memory.vectors import Vectors

if TYPE_CHECKING:
    from modules.memory.edit_memory import EditMemory

_VERSION = 1


def save(memory: "EditMemory", folder: Path) -> None:
    """Write both files; without an encoder, memory.json alone. Statements without a vector are encoded first."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row, request in enumerate(memory._rows) if request is not None]
    told: dict[str, Any] = {
        "version": _VERSION,
        "encoder": memory.encoder.name if memory.encoder else None,
        "edits": [
            {"request": {name: value for name, value in asdict(request).items() if value is not None}}
            | ({"aliases": aliases} if (aliases := memory._aliases.get(key)) else {})
            for request, key in ((memory._rows[row], key) for key, row in _in_order(memory))
            if request is not None
        ],
    }
    if memory.encoder:
        vectors = memory._encoded(rows)
        save_file({"vectors": vectors.table[torch.tensor(rows, dtype=torch.long)]}, folder / "memory.safetensors")
    else:
        (folder / "memory.safetensors").unlink(missing_ok=True)
    (folder / "memory.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")


def load(kind: type["EditMemory"], folder: Path, encoder: Encoder | None) -> "EditMemory":
    """Read both files.

    Raises:
        ValueError: for a missing or damaged file, or vectors of another encoder.
    """
    file = folder / "memory.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no edit memory: there is no {file.name}")
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        edits = [(EditRequest(**edit["request"]), tuple(edit.get("aliases", ()))) for edit in told["edits"]]
        version, name = told["version"], told["encoder"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {type(error).__name__} {error}; save the memory again") from error
    if version != _VERSION:
        raise ValueError(f"{file} is of version {version}; this is version {_VERSION}; save the memory again")
    if encoder and name and encoder.name != name:
        raise ValueError(f"{folder} holds vectors of the encoder {name!r}, not of {encoder.name!r}; give that encoder")
    memory = kind(encoder)
    for request, aliases in edits:
        memory._add(request, aliases)
    if len(memory) != len(edits):
        raise ValueError(f"{file} holds an edit twice; save the memory again")
    if encoder and name:
        memory._vectors = _vectors(folder / "memory.safetensors", len(edits), encoder.width)
    return memory


def _vectors(file: Path, count: int, width: int) -> Vectors:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; save the memory again")
    try:
        table = load_file(file)["vectors"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {error}; save the memory again") from error
    if table.shape != (count, width):
        raise ValueError(f"{file}: vectors {tuple(table.shape)} do not fit {count} edits of width {width}")
    vectors = Vectors(width)
    vectors.grow(count)
    vectors.put(range(count), table)
    return vectors


def _in_order(memory: "EditMemory") -> list[tuple[Any, int]]:
    return sorted(memory._row.items(), key=lambda item: item[1])
