"""What the editors that tune or remember share: which requests they take, and how their state is kept."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.evaluating import evaluating
from modules.hypernetwork.batch import Scored, scored
from modules.saved_edits import left_to_make, read_edits, write_edits

Layer = int | float  # see `locate.layer_numbers`


def to_make(method: str, requests: Sequence[EditRequest], known: Sequence[EditRequest] = ()) -> list[EditRequest]:
    """The requests that are not in force yet, each once: one whose prompt was given another answer since is made again.

    Raises:
        ValueError: for one without prompt and target.
    """
    for request in requests:
        if not (request.prompt.strip() and request.target.strip()):
            raise ValueError(
                f"{method} edits the answer to a prompt; the edit {request.statement!r} is free text: give it a "
                "`prompt` and a `target`"
            )
    return left_to_make(requests, known)


def encode_targets(backbone: Backbone, requests: Sequence[EditRequest]) -> list[Scored]:
    """Each request's tokens, and where its target begins.

    Raises:
        ValueError: for one that does not fit the context window.
    """
    room = getattr(backbone.model.config, "max_position_embeddings", None)
    rows = [scored(encode(backbone.tokenizer, r.prompt, r.target), r.prompt) for r in requests]
    for row, request in zip(rows, requests, strict=True):
        if room and len(row.ids) > room:
            raise ValueError(f"the edit {request.prompt!r} has {len(row.ids)} tokens, the context window has {room}")
    return rows


def kept(requests: Sequence[EditRequest], gone: Sequence[EditRequest]) -> list[int]:
    """The numbers of the requests that stay.

    Raises:
        ValueError: where one that is to go is not there.
    """
    out, there = set(gone), set(requests)
    if missing := [request for request in gone if request not in there]:
        raise ValueError(f"not among the edits, so it cannot be removed: {missing[0].statement!r}")
    return [i for i, request in enumerate(requests) if request not in out]


@contextmanager
def tuning(backbone: Backbone) -> Iterator[None]:
    """Gradients on and dropout off, whatever is around; the backbone's flags are put back."""
    with torch.inference_mode(False), torch.enable_grad(), evaluating(backbone.model):
        yield


# ---------------------------------------------------------------------- state in a folder


def save_state(folder: Path, method: str, requests: Sequence[EditRequest], tensors: Mapping[str, Tensor]) -> None:
    """Write edits.safetensors, which also names the method, and edits.json (the edits as text) to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(flat, folder / "edits.safetensors", {"method": method})
    write_edits(folder, requests)


def load_state(folder: Path, method: str, device: torch.device) -> tuple[list[EditRequest], dict[str, Tensor]]:
    """Read what `save_state` wrote.

    Raises:
        ValueError: where the folder holds no edits, or those of another method.
    """
    requests = read_edits(folder, "edits.safetensors")
    try:
        with torch.inference_mode(False), safe_open(folder / "edits.safetensors", "pt", device=str(device)) as file:
            wrote = (file.metadata() or {}).get("method")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder / 'edits.safetensors'} cannot be read: {error}; make its edits again") from error
    if wrote != method:
        raise ValueError(f"the edits in {folder} were made by {wrote}, not by {method}")
    return requests, tensors
