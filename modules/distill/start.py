"""The edits that a student starts from: what any editor adds to weights, as terms of the forward pass.

Published: MEMIT with all of the edits (paper, section 4.2; without it specificity is lost).
"""

import json
import os
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.delta_edited import MEMORY
from modules.editor import Editor
from modules.interventions import Deltas, LowRank, shape
from modules.summed import Summed
from modules.training_free.metrics import forget

FILE = "deltas.safetensors"
VERSION = 1  # of what editors make: a change makes old folders unknown


def make(start: Editor, backbone: Backbone, requests: Sequence[EditRequest], weights: str, folder: Path) -> Path:
    """Let an editor make these requests, unless it has before; the folder where they are kept, in the form of
    `trainers.edit --save`.

    The name is made of the editor with all its settings, the requests and the model.

    Args:
        weights: a hash of the model's.

    Raises:
        ValueError: for an editor whose edits are no change of weights; and what the editor raises.
    """
    what = [VERSION, weights, sha256(pickle.dumps(start, protocol=4)).hexdigest(), [asdict(r) for r in requests]]
    place = folder / f"start-{start.name}-{sha256(json.dumps(what).encode()).hexdigest()[:24]}"
    if (place / FILE).is_file():
        return place
    with start.edit(backbone, requests) as edited:
        changes = edited.weight_changes()
    forget(backbone.model)  # beside the student that is trained now there may be no room
    if not changes:
        raise ValueError(
            f"model.start: the edits of {start.name} are no change of weights, so no student can start from them; take "
            "MEMIT, another editor of weights, or none"
        )
    part = place.with_name(f".{place.name}.{os.getpid()}")
    keep(changes, requests, part)
    try:
        os.replace(part, place)
    except OSError:  # another run has made the same edits meanwhile: a folder that is not empty is not replaced
        if not (place / FILE).is_file():
            raise
        shutil.rmtree(part)
    return place


def keep(changes: Mapping[str, LowRank | Tensor], requests: Sequence[EditRequest], folder: Path) -> None:
    """Write changes of weights as deltas that belong to all requests together, and the requests as text."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {}
    for name, change in changes.items():
        t = as_term(change)
        parts = Deltas(t.a[0], t.b[0], torch.zeros(t.a.shape[1], dtype=torch.long))
        flat |= {f"{name}.{part}": tensor.detach().cpu().contiguous() for part, tensor in parts._asdict().items()}
    save_file(flat, folder / FILE)
    edits = [asdict(r) for r in requests]
    (folder / "edits.json").write_text(json.dumps(edits, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def digest(folder: Path) -> str:
    """By which the edits in a folder are known again."""
    with (folder / FILE).open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def file_in(folder: Path) -> Path:
    """The file of edits in a folder.

    Raises:
        ValueError: where the folder holds none.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(
            f"model.start: {folder} holds no {FILE}; make one with `python -m trainers.edit --editor memit ... --save "
            f"{folder}`, or give an editor by class_path"
        )
    return file


def read(folder: Path, backbone: Backbone) -> dict[str, Summed]:
    """What a student has from the beginning, by the linear layer's name, on the CPU, from a folder of edits.

    Raises:
        ValueError: where the folder holds none, or those of another model.
    """
    file = file_in(folder)
    try:
        flat = {name: t for name, t in load_file(file).items() if not name.startswith(MEMORY)}
    except SafetensorError as error:
        raise ValueError(f"model.start: {file} cannot be read: {error}; make its edits again") from error
    terms = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in flat):
        deltas = Deltas(*(flat[f"{name}.{part}"] for part in Deltas._fields))
        if (deltas.a.shape[1], deltas.b.shape[1]) != shape(backbone.model, name):
            raise ValueError(f"model.start: the edits in {folder} are of a model of another size; make them again")
        terms[name] = Summed.of(deltas).flat()
    if not terms:
        raise ValueError(f"model.start: {folder} holds no edits")
    return terms


def as_term(change: LowRank | Tensor) -> LowRank:
    """A change of a weight, dense [d_in, d_out] or not, as a term of one row."""
    if isinstance(change, LowRank):
        return change
    d_in, d_out = change.shape
    one = torch.eye(min(d_in, d_out), dtype=change.dtype, device=change.device)[None]
    return LowRank(one, change[None]) if d_in <= d_out else LowRank(change.T[None], one)


def as_sum(a: Tensor, b: Tensor) -> Summed:
    """Factors [r, d_in] and [r, d_out] as a matrix, where they are more numbers than that."""
    return Summed.of(Deltas(a, b, torch.zeros(len(a), dtype=torch.long, device=a.device)))


def joined(first: Mapping[str, Summed], adapters: Mapping[str, Summed]) -> dict[str, Summed]:
    """The sums of two, layer by layer, of which the second has factors alone."""
    both = {
        name: Summed(torch.cat([first[name].a, t.a]), torch.cat([first[name].b, t.b]), first[name].whole)
        for name, t in adapters.items()
        if name in first
    }
    return {**first, **adapters, **both}


def moved(terms: Mapping[str, Summed], device: torch.device) -> dict[str, Summed]:
    """The same terms on a device."""
    return {name: t.to(device) for name, t in terms.items()}


def placed(model: nn.Module, terms: Mapping[str, Summed]) -> dict[str, Summed]:
    """Terms by the names of plain linear layers: of one that has an adapter, of the layer within."""
    return {
        f"{name}.base_layer" if isinstance(model.get_submodule(name), BaseTunerLayer) else name: term
        for name, term in terms.items()
    }
