"""What one sort of trained editor writes to a folder, and how it is read again; safetensors and JSON alone."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn


class Kind(NamedTuple):
    """How one sort of trained editor is written and read.

    Args:
        write: write all files but editor.json, and return what `build` needs of it.
        build: the untrained module, from what editor.json of a folder tells.
        fill: read the trained tensors of the folder into the module.
    """

    write: Callable[[Any, Path], dict[str, Any]]
    build: Callable[[Path, dict[str, Any]], Any]
    fill: Callable[[Any, Path], None]


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of an export.

    Raises:
        ValueError: where it is missing or cannot be read; it names the file.
    """
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; export again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; export again") from error


def fill_tensors(model: nn.Module, saved: dict[str, Tensor], wanted: set[str], folder: Path) -> None:
    """Read saved tensors into a model: all that are wanted, and no others.

    Raises:
        ValueError: where names or shapes do not fit; it names the folder.
    """
    missing, extra = sorted(wanted - set(saved)), sorted(set(saved) - wanted)
    if missing or extra:
        raise ValueError(f"{folder}: tensors do not fit editor.json: missing {missing[:3]}, unknown {extra[:3]}")
    shapes = {n: t.shape for n, t in model.state_dict(keep_vars=True).items()}
    wrong = [n for n, t in saved.items() if t.shape != shapes[n]]
    if wrong:
        raise ValueError(f"{folder}: tensors do not fit editor.json: of another shape {sorted(wrong)[:3]}")
    model.load_state_dict(saved, strict=False)
