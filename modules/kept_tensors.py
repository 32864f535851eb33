"""Tensors that are kept on disk to be made once: where, and how they are written and read."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CACHE_FOLDER = "PALIMPSEST_CACHE"  # the environment variable that names the folder


def folder(given: str | None = None) -> Path:
    """The folder that is given, else the one that PALIMPSEST_CACHE names, else ~/.cache/palimpsest."""
    chosen = given or os.environ.get(CACHE_FOLDER)
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "palimpsest"


def write(file: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; processes that share a folder never see half of one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, part, dict(about))
    os.replace(part, file)


def read(file: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of these names, in this order, and what was said about them.

    Raises:
        ValueError: for a file that cannot be read or lacks one of them.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in names}, dict(opened.metadata() or {})
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it, and it is made again") from error
