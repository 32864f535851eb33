"""A backbone and editors on a device: what a command builds once, and each of its worker processes for itself."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from modules.backbone import Backbone, BackboneConfig, WithoutAdapters, load_backbone
from modules.editor import Editor
from modules.export import load_editor
from modules.training_free.icl import InContext, RightEdit, Unedited
from trainers.editors import Chosen, Spec, TrainingFree, choose, read

BASELINES: dict[str, type[Editor]] = {e.name: e for e in (Unedited, InContext, RightEdit)}


@dataclass(frozen=True)
class Specs:
    """What a backbone and editors are built from, in any process.

    Args:
        backbone: by default that of the first exported editor.
        editors: as `--editor` of trainers.evaluate.
        baselines: names of `BASELINES`, which come before them.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
    """

    backbone: BackboneConfig | None
    editors: tuple[Spec, ...]
    baselines: tuple[str, ...] = ()
    device: str = "auto"


def wanted_of(specs: Specs) -> list[TrainingFree | Path]:
    """The editors read but not built, and everything checked that needs no model.

    Raises:
        ValueError: for an unknown baseline or editor, where there is nothing to take a backbone from, and for a device
            that is not there.
    """
    wrong = sorted(set(specs.baselines) - set(BASELINES))
    if wrong:
        raise ValueError(f"unknown baseline {wrong[0]!r}; there are: {', '.join(BASELINES)}")
    wanted = read(specs.editors)
    if specs.backbone is None and not any(isinstance(one, Path) for one in wanted):
        raise ValueError("nothing to evaluate on: give --editor DIR of an exported editor, or --backbone.source")
    device_named(specs.device)
    return wanted


def build(specs: Specs, device: str | None = None) -> tuple[Backbone, list[Chosen]]:
    """The backbone, and baselines and editors in the order given.

    Args:
        device: in place of that of `specs`.

    Raises:
        ValueError: as `wanted_of` and `trainers.editors.choose` do.
    """
    wanted = wanted_of(specs)
    place = device_named(device or specs.device)
    exported = {one: load_editor(one) for one in wanted if isinstance(one, Path)}
    model = load_backbone(specs.backbone) if specs.backbone else next(iter(exported.values())).reader
    if isinstance(model, WithoutAdapters):  # only its own editor passes its adapters by
        model = load_backbone(model.config, model.tokenizer)
    for folder, editor in exported.items():
        if (own := editor.reader) is not model and _size(own) != _size(model):
            raise ValueError(
                f"--editor {folder} was trained on {own.config.source}, and backbone.source is {model.config.source}: "
                f"give --backbone null, or --backbone.source {own.config.source}"
            )
    model.model.to(place)  # type: ignore[arg-type]
    for editor in exported.values():
        editor.to(place)
    baselines = [Chosen(BASELINES[name](), {"baseline": name}) for name in specs.baselines]
    return model, baselines + choose(wanted, model, exported)


def _size(backbone: Backbone) -> tuple[Any, ...]:
    """What no editor can look past."""
    return backbone.model.config.model_type, len(backbone.layers), backbone.hidden_size


def device_named(name: str) -> torch.device:
    """A device by what a user writes.

    Raises:
        ValueError: for one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"--device {name!r} is none: give cpu, cuda, cuda:1 or auto") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def nth_device(n: int) -> str:
    """The device of the n-th worker process: a GPU of its own as long as there are any."""
    count = torch.cuda.device_count()
    return f"cuda:{n % count}" if count else "cpu"


_mine: dict[str, Any] = {}


def prepare(specs: Specs, devices: Any, threads: int) -> None:
    """Of a new worker process: take a device off the queue, and build everything on it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(threads)
    backbone, editors = build(specs, devices.get())
    _mine.update(backbone=backbone, editors={c.editor.name: c.editor for c in editors})


def built() -> tuple[Backbone, dict[str, Editor]]:
    """What `prepare` built in this process."""
    return _mine["backbone"], _mine["editors"]
