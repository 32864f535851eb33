"""The edits that a student starts from: what any editor adds to weights, as terms of the forward pass.

Published: MEMIT with all of the edits (paper, section 4.2; without it specificity is lost).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.delta_edited import MEMORY
from modules.editor import Editor
from modules.interventions import Deltas, LowRank, shape

FILE = "deltas.safetensors"


def start_terms(start: Editor | str | None, backbone: Backbone, requests: Sequence[EditRequest]) -> dict[str, LowRank]:
    """What a student has from the beginning, by the linear layer's name, on the CPU; empty without a start.

    Args:
        start: an editor that makes these requests now; or a folder of edits, as `trainers.edit --save` writes it of
            editors with low-rank edits.

    Raises:
        ValueError: for an editor whose edits are no change of weights, or a folder that holds none of this model.
    """
    if start is None:
        return {}
    if isinstance(start, str):
        return _read(Path(start), backbone)
    with start.edit(backbone, requests) as edited:
        terms = {name: as_term(change) for name, change in edited.weight_changes().items()}
    if not terms:
        raise ValueError(
            f"model.start: the edits of {start.name} are no change of weights, so no student can start from them; take "
            "MEMIT, another editor of weights, or none"
        )
    return {name: LowRank(t.a.detach().cpu(), t.b.detach().cpu()) for name, t in terms.items()}


def as_term(change: LowRank | Tensor) -> LowRank:
    """A change of a weight, dense [d_in, d_out] or not, as a term of one row."""
    if isinstance(change, LowRank):
        return change
    d_in, d_out = change.shape
    one = torch.eye(min(d_in, d_out), dtype=change.dtype, device=change.device)[None]
    return LowRank(one, change[None]) if d_in <= d_out else LowRank(change.T[None], one)


def joined(first: Mapping[str, LowRank], then: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Terms of one row, those of a layer that has two as their sum."""
    both = {
        name: LowRank(torch.cat([first[name].a, then[name].a], 1), torch.cat([first[name].b, then[name].b], 1))
        for name in first.keys() & then.keys()
    }
    return {**first, **then, **both}


def moved(terms: Mapping[str, LowRank], device: torch.device) -> dict[str, LowRank]:
    """The same terms on a device."""
    return {name: LowRank(t.a.to(device), t.b.to(device)) for name, t in terms.items()}


def placed(model: nn.Module, terms: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """Terms by the names of plain linear layers: of one that has an adapter, of the layer within."""
    return {
        f"{name}.base_layer" if isinstance(model.get_submodule(name), BaseTunerLayer) else name: term
        for name, term in terms.items()
    }


def _read(folder: Path, backbone: Backbone) -> dict[str, LowRank]:
    file = folder / FILE
    if not file.is_file():
        raise ValueError(
            f"model.start: {folder} holds no {FILE}; make one with `python -m trainers.edit --editor memit ... --save "
            f"{folder}`, or give an editor by class_path"
        )
    try:
        flat = {name: t for name, t in load_file(file).items() if not name.startswith(MEMORY)}
    except SafetensorError as error:
        raise ValueError(f"model.start: {file} cannot be read: {error}; make its edits again") from error
    terms = {}
    for name in dict.fromkeys(key.rpartition(".")[0] for key in flat):
        deltas = Deltas(*(flat[f"{name}.{part}"] for part in Deltas._fields))
        if (deltas.a.shape[1], deltas.b.shape[1]) != shape(backbone.model, name):
            raise ValueError(f"model.start: the edits in {folder} are of a model of another size; make them again")
        count = int(deltas.edit.max()) + 1 if len(deltas.edit) else 0
        terms[name] = deltas.term(1, torch.zeros(count, dtype=torch.long)).compact()
    if not terms:
        raise ValueError(f"model.start: {folder} holds no edits")
    return terms
