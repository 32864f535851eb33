"""Second moments of what goes into linear layers: C = E[k k'], not centred, over the tokens of any text.

They say what a layer's ordinary inputs look like, which locate-and-edit methods leave as they are. Taken once for a
model and a text and kept on disk as safetensors, under a name made of the weights, the layer, the text and the sample.

W windows of text, T tokens, f = d_in of a layer.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from datamodules.texts import identity, read_texts
from datamodules.tokens import pad, pad_id, windows
from modules.backbone import Backbone
from modules.fingerprint import weights_hash
from modules.interventions import linear, shape
from modules.kept_tensors import folder as kept_folder
from modules.kept_tensors import read, write
from modules.training_free.subject import Enough
from modules.training_free.templates import sample, start_ids

VERSION = 2  # of what is counted: a change makes old files unknown
# of a config, what says nothing of what a model computes
NAMES = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
Progress = Callable[[int, int], None]  # tokens done, and in all


@dataclass
class Moments:
    """Over which text second moments are taken, and where they are kept.

    Args:
        text: a file or a Hugging Face data set as NAME:CONFIG:SPLIT (see `datamodules.texts`), or `model`: text drawn
            from the model itself, where nothing else is at hand.
        tokens: so many are counted. Papers: 100,000 articles of Wikipedia; no fewer than some times the layer's inputs.
        length: of a window of running text, in tokens.
        field: the column of a data set.
        seed: of the order of a data set, and of text drawn from the model.
        batch: windows of one forward pass.
        accumulate: precision of the sums. Products are made in float32.
        folder: of the files; by default the one named by the environment variable PALIMPSEST_CACHE, or
            ~/.cache/palimpsest.

    Raises:
        ValueError: for sizes below 1.
    """

    text: str = "model"
    tokens: int = 100_000
    length: int = 512
    field: str = "text"
    seed: int = 0
    batch: int = 8
    accumulate: Literal["float32", "float64"] = "float64"
    folder: str | None = None

    def __post_init__(self) -> None:
        if min(self.tokens, self.batch) < 1 or self.length < 2:
            raise ValueError(f"moments: tokens and batch must be at least 1, length at least 2, got {self}")

    def where(self) -> Path:
        """The folder of the files."""
        return kept_folder(self.folder)

    def file(self, backbone: Backbone, layer: str, kind: str = "moments") -> Path:
        """Where the second moments of a linear layer's inputs, or what is made of them, are kept."""
        what = [VERSION, fingerprint(backbone.model), layer, *self.sample(), self.accumulate]
        key = sha256(json.dumps(what).encode()).hexdigest()[:20]
        return self.where() / f"{kind}-{backbone.model.config.model_type}-{layer}-{key}.safetensors"

    def sample(self) -> list[Any]:
        """What decides which tokens are counted, beside the model."""
        text = "model" if self.text == "model" else identity(self.text)
        return [text, self.tokens, self.length, self.field, self.seed]


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of a model's weights and of its config. It is taken anew when a weight lies elsewhere, when torch has
    counted a change of it, or when a sample of it is another (of such as are changed behind torch's back)."""
    look = sha256()
    for name, p in model.named_parameters():
        flat = p.detach().reshape(-1)
        places = torch.linspace(0, max(0, flat.numel() - 1), 16, device=p.device, dtype=torch.float64).long()
        some = flat[places[: flat.numel()]].float().cpu()
        told = f"{name}{tuple(p.shape)}{p.dtype}{p.data_ptr()} {p._version}"
        look.update(told.encode() + some.numpy().tobytes())
    known: dict[str, str] = vars(model).setdefault("_palimpsest_fingerprint", {})
    if look.hexdigest() not in known:
        for name, p in model.named_parameters():
            if not p.numel():
                raise ValueError(f"weight {name!r} is not whole on this process (ZeRO-3): gather the weights first")
        known.clear()
        settings = {k: v for k, v in model.config.to_diff_dict().items() if k not in NAMES and not k.startswith("_")}
        told = json.dumps(settings, sort_keys=True, default=str)
        known[look.hexdigest()] = sha256(f"{weights_hash(model)} {told}".encode()).hexdigest()
    return known[look.hexdigest()]


def second_moments(
    backbone: Backbone, layers: Sequence[str], moments: Moments, progress: Progress | None = None
) -> dict[str, Tensor]:
    """C [f, f] in float32 of linear layers by name, on the model's device; see `counted`."""
    files = counted(backbone, layers, moments, progress)
    return {name: read_moments(file, backbone.device) for name, file in files.items()}


def read_moments(file: Path, device: torch.device) -> Tensor:
    """C [f, f] in float32."""
    return read(file, ["moments"])[0]["moments"].to(device)


def counted(
    backbone: Backbone, layers: Sequence[str], moments: Moments, progress: Progress | None = None
) -> dict[str, Path]:
    """The files of the second moments of linear layers by name, which are counted now, in one go, where they are not.

    Raises:
        ValueError: for a name that is no linear layer, and for a text that cannot be read or is too short.
    """
    for name in layers:
        linear(backbone.model, name)
    files = {name: moments.file(backbone, name) for name in layers}
    missing = [name for name, file in files.items() if not file.is_file()]
    found = count(backbone, missing, moments, progress) if missing else {}
    for name, (matrix, tokens, ids) in found.items():
        about = {"layer": name, "text": moments.text, "tokens": str(tokens), "sample": ids}
        write(files[name], {"moments": matrix}, about)
    return files


@torch.no_grad()
def count(
    backbone: Backbone, layers: Sequence[str], moments: Moments, progress: Progress | None = None
) -> dict[str, tuple[Tensor, int, str]]:
    """Second moments [f, f], the number of tokens, and the hash of their ids, by layer; nothing is kept."""
    room = getattr(backbone.model.config, "max_position_embeddings", None) or moments.length
    length = min(moments.length, room)
    wide = getattr(torch, moments.accumulate)
    sums = {n: torch.zeros(shape(backbone.model, n)[0], dtype=wide, device=backbone.device) for n in layers}
    sums = {n: torch.diag(s) for n, s in sums.items()}
    done, ids_seen, batch = 0, sha256(), []

    def run(rows: list[tuple[int, ...]]) -> int:
        ids, mask = (t.to(backbone.device) for t in pad(rows, pad_id(backbone.tokenizer)))
        with _summing(backbone.model, sums, mask.bool()):
            backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        return int(mask.sum())

    for row in _windows(backbone, moments, length):
        ids_seen.update(str(row).encode())
        batch.append(row)
        if len(batch) == moments.batch:
            done += run(batch)
            batch = []
            if progress:
                progress(done, moments.tokens)
    if batch:
        done += run(batch)
    if progress:
        progress(done, moments.tokens)
    narrow = [name for name, s in sums.items() if done < len(s)]
    if narrow:
        raise ValueError(
            f"{done:,} tokens of {moments.text!r} are too few for the {len(sums[narrow[0]]):,} inputs of {narrow[0]}; "
            "give a longer text, or raise moments.tokens to some times that number"
        )
    # one by one: beside a large model there is no room for all of them twice
    return {name: ((sums.pop(name) / done).float(), done, ids_seen.hexdigest()) for name in list(sums)}


def null_space(
    backbone: Backbone, layer: str, moments: Moments, threshold: float, relative: bool = False
) -> tuple[Tensor, int]:
    """Directions that ordinary inputs of a layer hardly use, as their complement (AlphaEdit, arXiv 2410.02355, 3.2).

    Args:
        threshold: eigenvalues of the second moments below it count as unused. The paper's .02 is in units of the
            model's own activations, so the share that is left differs from model to model: it is returned.
        relative: threshold is in units of the mean eigenvalue instead.

    Returns:
        An orthonormal basis [f, r] of the directions that are used, and the rank f - r that is left to edits.

    Raises:
        ValueError: where none is left.
    """
    file = used_file(backbone, layer, moments, threshold, relative)
    if not file.is_file():
        matrix = second_moments(backbone, [layer], moments)[layer].double()
        values, vectors = torch.linalg.eigh(matrix)
        limit = threshold * float(values.mean()) if relative else threshold
        used = vectors[:, values >= limit]
        write(file, {"basis": used.float()}, {"layer": layer, "retained_rank": str(len(matrix) - used.shape[1])})
    basis = read(file, ["basis"])[0]["basis"].to(backbone.device)
    rank = basis.shape[0] - basis.shape[1]
    if rank == 0:
        raise ValueError(
            f"no direction of {layer} has a second moment below {threshold}: nothing can be edited there. Raise the "
            "threshold, or set relative: true, which counts in units of the mean"
        )
    return basis, rank


def used_file(backbone: Backbone, layer: str, moments: Moments, threshold: float, relative: bool) -> Path:
    """Where the basis of `null_space` is kept."""
    return moments.file(backbone, layer, f"used-{threshold:g}{'r' if relative else ''}")


def _windows(backbone: Backbone, moments: Moments, length: int) -> Iterator[tuple[int, ...]]:
    if moments.text != "model":
        texts = read_texts(moments.text, moments.field, moments.seed)
        yield from windows(backbone.tokenizer, texts, length, moments.tokens)
        return
    generator = torch.Generator().manual_seed(moments.seed)
    left = moments.tokens
    while left > 0:
        for row in sample(backbone, [start_ids(backbone, "")] * moments.batch, length, None, generator):
            if left > 0:
                yield tuple(row[:left])
                left -= len(row)


class _summing:
    """Add the outer products of what goes into linear layers, at real tokens, to sums [f, f]; then stop."""

    def __init__(self, model: nn.Module, sums: Mapping[str, Tensor], mask: Tensor) -> None:
        self.model, self.sums, self.mask, self.left = model, sums, mask, len(sums)

    def __enter__(self) -> None:
        self.handles = [
            linear(self.model, name).register_forward_pre_hook(self._hook(total)) for name, total in self.sums.items()
        ]

    def __exit__(self, kind: type | None, *_: object) -> bool:
        for handle in self.handles:
            handle.remove()
        return kind is Enough

    def _hook(self, total: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            keys = args[0][self.mask]
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32))  # [n, f]
            total.add_((keys.T @ keys).to(total.dtype))
            self.left -= 1
            if not self.left:
                raise Enough

        return add
