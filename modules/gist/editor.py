"""InComeS as an editor: requests become gists in a pool, and every pass of the model reads from that pool."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.records import EditRequest
from datamodules.tokens import encode, pad, pad_id
from modules.asked import parts_of
from modules.backbone import Backbone
from modules.editor import Edited, TargetScore, TrainedEditor
from modules.evaluating import evaluating
from modules.fingerprint import weights_hash
from modules.gist.model import GistModel
from modules.gist.pool import GistPool
from modules.saved_edits import kept_without


class GistEdited(Edited):
    """A gist model with a pool of edits.

    Args:
        requests, pool: the edits and their gists, in the same order.
    """

    def __init__(self, model: GistModel, requests: Sequence[EditRequest], pool: GistPool) -> None:
        super().__init__(model.reader, bos=model.config.bos)  # as in training
        self.model = model
        self.requests = tuple(requests)
        self.pool = pool

    def decode(
        self, ids: Tensor, mask: Tensor, state: Any = None, trace: dict[int, Tensor] | None = None, **options: Any
    ) -> tuple[Any, Any]:
        return self.model(ids, mask, self.pool, carried=state, trace=trace, **options)

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        """See `Edited.score`. Solved questions before the one that is asked are read without the pool, once for all."""
        scores: dict[int, TargetScore] = {}
        for reader, rows, given in self._parts(prompts):
            found = super(GistEdited, reader).score(given, [targets[i] for i in rows], batch_size, top_k)
            scores |= zip(rows, found, strict=True)
        return [scores[i] for i in range(len(prompts))]

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """See `Edited.generate`, and `score`."""
        texts: dict[int, str] = {}
        for reader, rows, given in self._parts(prompts):
            texts |= zip(rows, super(GistEdited, reader).generate(given, max_new_tokens, batch_size), strict=True)
        return [texts[i] for i in range(len(prompts))]

    def _parts(self, prompts: Sequence[str]) -> Iterator[tuple["GistEdited", list[int], list[str]]]:
        """Who reads which prompts, and what of them."""
        if not len(self.pool):
            yield self, list(range(len(prompts))), list(map(str, prompts))
            return
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(parts_of(prompt)[0], []).append(i)
        for shots, rows in groups.items():
            yield self._after(shots), rows, [parts_of(prompts[i])[1] for i in rows]

    @torch.no_grad()
    def _after(self, shots: str) -> "GistEdited":
        """The same after text that no edit is to be read in: an edited fact may be named there that is not asked."""
        if not shots:
            return self
        reader = GistEdited(self.model, self.requests, self.pool)
        reader.context = shots
        ids = torch.tensor([encode(self.backbone.tokenizer, shots, bos=self.bos).ids], device=self.backbone.device)
        reader._check_room(ids.shape[1])
        out, _ = self.model(ids, torch.ones_like(ids), None, use_cache=True)
        reader._prefix = (out.last_hidden_state[0, -1], out.cache)
        return reader

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["GistEdited"]:
        """The same with more edits; an edit that stands in the pool already is not encoded again."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> "GistEdited":
        """A pool with more edits. Encoding them now or with the others gives the same gists."""
        known = {r.statement for r in self.requests}
        new = [r for r in {r.statement: r for r in requests}.values() if r.statement not in known]
        pool = GistPool.join([self.pool, encode_edits(self.model, new)]) if new else self.pool
        return GistEdited(self.model, [*self.requests, *new], pool)

    def remove(self, requests: Sequence[EditRequest]) -> "GistEdited":
        """A pool without these edits.

        Raises:
            ValueError: for an edit that is not in the pool.
        """
        rows = kept_without(self.requests, requests)
        return GistEdited(self.model, [self.requests[i] for i in rows], self.pool.keep(rows))

    def save(self, folder: Path) -> None:
        """Write pool.safetensors, which says what encoded it, and pool.json (the edits as text) to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.pool.map(lambda t: t.cpu()).tensors(), folder / "pool.safetensors", _encoder(self.model))
        lines = [asdict(r) for r in self.requests]
        (folder / "pool.json").write_text(json.dumps(lines, ensure_ascii=False, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, model: GistModel, folder: Path) -> "GistEdited":
        """Read a pool that `save` wrote.

        Raises:
            ValueError: where the folder holds no pool, or one of another model.
        """
        for name in ("pool.safetensors", "pool.json"):
            if not (folder / name).is_file():
                raise ValueError(f"{folder} holds no {name}; give a folder that an edited model was saved to")
        requests = [EditRequest(**r) for r in json.loads((folder / "pool.json").read_text(encoding="utf-8"))]
        try:
            flat = load_file(folder / "pool.safetensors", device=str(model.backbone.device))
            with safe_open(folder / "pool.safetensors", "pt") as file:
                told = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(
                f"{folder / 'pool.safetensors'} cannot be read: {error}; encode its edits again"
            ) from error
        pool = GistPool.from_tensors(flat)
        backbone = model.backbone
        shapes = {n: t.shape[1:] for n, t in flat.items()}
        expected: dict[str, tuple[int, ...]] = {
            f"layers.{i}.{n}": (backbone.key_value_heads, backbone.head_dim)
            for i in model.active
            for n in ("keys", "values")
        }
        if model.matcher is not None:
            expected["address"] = (backbone.hidden_size,)
        wrong = ["shapes"] if shapes != expected else []
        if told and not wrong:
            wrong = [name for name, value in _encoder(model).items() if told.get(name) != value]
        if flat and wrong:
            raise ValueError(
                f"the pool in {folder} was encoded by another model (other {', '.join(wrong)}): encode its edits again"
            )
        if not told:
            rank_zero_warn(f"the pool in {folder} does not say which model encoded it; if this one did, save it again")
        if len(requests) != len(pool):
            raise ValueError(f"{folder}: pool.json lists {len(requests)} edits, pool.safetensors holds {len(pool)}")
        return cls(model, requests, pool)


def _encoder(model: GistModel) -> dict[str, str]:
    """What has to be the same for a pool to be read as it was written. Reads all weights."""
    config = model.config
    return {
        "layers": config.layers,
        "selection": config.selection,
        "keys": config.keys,
        "match_layer": str(model.match_layer),
        "weights": weights_hash(model)[:16],
    }


class GistEditor(TrainedEditor):
    """The editor of a trained gist model.

    Full training changes the model itself, so the model that answers is the editor's own; the backbone that is passed
    to `edit` must be of the same kind, and stays untouched.
    """

    name = "incomes"

    def __init__(self, model: GistModel) -> None:
        self.model = model

    @property
    def reader(self) -> Backbone:
        return self.model.reader

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        for backbone in (self.model.backbone, self.model.reader):
            backbone.model.to(device)  # type: ignore[arg-type]

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[GistEdited]:
        own = self.model.backbone
        if backbone.model.config.model_type != own.model.config.model_type or len(backbone.tokenizer) != len(
            own.tokenizer
        ):
            raise ValueError(
                f"this editor was trained on {own.config.source!r} ({own.model.config.model_type}); it cannot edit "
                f"{backbone.config.source!r} ({backbone.model.config.model_type})"
            )
        with evaluating(self.model):
            yield GistEdited(self.model, [], GistPool()).add(requests)


@torch.no_grad()
def encode_edits(model: GistModel, requests: Sequence[EditRequest], chunk: int = 256) -> GistPool:
    """Encode edits, a chunk at a time, equal lengths together; the pool is in the order of the requests.

    Raises:
        ValueError: for an edit that does not fit into the model's context window.
    """
    tokenizer = model.backbone.tokenizer
    rows = [encode(tokenizer, "", r.statement).ids for r in requests]
    room = getattr(model.backbone.model.config, "max_position_embeddings", None)
    for row, request in zip(rows, requests, strict=True):
        if room and len(row) >= room:
            raise ValueError(f"an edit of {len(row)} tokens does not fit into {room}: {request.statement[:60]!r} ...")
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    parts = []
    for at in range(0, len(order), chunk):
        ids, mask = pad([rows[i] for i in order[at : at + chunk]], pad_id(tokenizer))
        parts.append(model.compress(ids.to(model.backbone.device), mask.to(model.backbone.device)))
    back = sorted(range(len(order)), key=order.__getitem__)
    return GistPool.join(parts).keep(back)
