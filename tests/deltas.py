"""A small editor that changes weights, and what it was asked to do: for tests of what runs editors."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.interventions import LowRank, low_rank, merged, shape
from trainers.benchmark import work


@dataclass
class Draw:
    """How the terms are drawn.

    Args:
        scale: of a term.
    """

    scale: float = 1.0


class NudgedModel(Edited):
    """A backbone with a rank-one term for each edit."""

    def __init__(
        self, editor: "Nudge", backbone: Backbone, requests: Sequence[EditRequest], terms: dict[str, LowRank]
    ) -> None:
        super().__init__(backbone)
        self.editor, self.requests, self.terms = editor, list(requests), terms

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        with low_rank(self.backbone.model, self.terms):
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["NudgedModel"]:
        every = [*self.requests, *requests]
        yield NudgedModel(self.editor, self.backbone, every, self.editor.terms(self.backbone, requests, self.terms))

    def weight_changes(self) -> dict[str, LowRank]:
        return self.terms

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"{n}.{part}": getattr(t, part) for n, t in self.terms.items() for part in ("a", "b")}
        save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "terms.safetensors")
        (folder / "edits.json").write_text(json.dumps([asdict(r) for r in self.requests]))

    def restored(self, folder: Path) -> "NudgedModel":
        flat = load_file(folder / "terms.safetensors")
        names = {key.rpartition(".")[0] for key in flat}
        requests = [EditRequest(**r) for r in json.loads((folder / "edits.json").read_text())]
        terms = {n: LowRank(flat[f"{n}.a"], flat[f"{n}.b"]) for n in sorted(names)}
        return NudgedModel(self.editor, self.backbone, requests, terms)

    def merge(self) -> PreTrainedModel:
        return merged(self.backbone.model, self.terms)


class Nudge(Editor):
    """Adds a random rank-one term for each edit to the down projection of some layers.

    Args:
        layers: which.
        draw: how.
        fails_after: so many edits of one call; -1: never.
        fails_on_rank: of a job.
        harm: what it does to the run before: write into a weight, kill its process, leave flags and gradients behind.
    """

    name = "nudge"
    calls: ClassVar[list[int]] = []  # edits of each call, of all instances

    def __init__(
        self,
        layers: list[int],
        draw: Draw | None = None,
        fails_after: int = -1,
        fails_on_rank: int | None = None,
        harm: str | None = None,
    ) -> None:
        self.layers, self.draw = layers, draw or Draw()
        self.fails_after, self.fails_on_rank, self.harm = fails_after, fails_on_rank, harm

    def terms(self, backbone: Backbone, requests: Sequence[EditRequest], old: dict[str, LowRank]) -> dict[str, LowRank]:
        if self.harm:
            harm(backbone, self.harm)
        if 0 <= self.fails_after < len(requests):
            raise ValueError(f"at most {self.fails_after} edits")
        if os.environ.get("RANK") == str(self.fails_on_rank):
            raise ValueError(f"not on rank {self.fails_on_rank}")
        Nudge.calls.append(len(requests))
        terms = dict(old)
        for i in self.layers:
            name = f"{backbone.parts.layers}.{i}.{backbone.parts.down}"
            d_in, d_out = shape(backbone.model, name)
            a = torch.randn(1, len(requests), d_in, device=backbone.device)
            b = self.draw.scale * torch.randn(1, len(requests), d_out, device=backbone.device)
            if name in old:
                a, b = torch.cat([old[name].a, a], 1), torch.cat([old[name].b, b], 1)
            terms[name] = LowRank(a, b)
        return terms

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[NudgedModel]:
        yield NudgedModel(self, backbone, requests, self.terms(backbone, requests, {}))


class Dies(Nudge):
    """A `Nudge` whose process is killed by an edit on top of so many.

    Args:
        layers: see `Nudge`.
        after: edits in force.
    """

    def __init__(self, layers: list[int], after: int) -> None:
        super().__init__(layers)
        self.after = after

    def terms(self, backbone: Backbone, requests: Sequence[EditRequest], old: dict[str, LowRank]) -> dict[str, LowRank]:
        if sum(term.a.shape[1] for term in old.values()) >= self.after * len(self.layers):
            harm(backbone, "kill")
        return super().terms(backbone, requests, old)


class Breaks(Nudge):
    """A `Nudge` whose edit leaves its process as an illegal memory access on a GPU does: it is found to be of no use,
    and every further edit fails there."""

    broken: ClassVar[bool] = False  # this process

    def terms(self, backbone: Backbone, requests: Sequence[EditRequest], old: dict[str, LowRank]) -> dict[str, LowRank]:
        Breaks.broken = Breaks.broken or self.harm == "context"
        if Breaks.broken:
            work.usable = lambda _: False
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return super().terms(backbone, requests, old)


class Reads(Nudge):
    """A `Nudge` that names a file.

    Args:
        layers: see `Nudge`.
        texts: the file.
    """

    def __init__(self, layers: list[int], texts: str) -> None:
        super().__init__(layers)
        self.texts = texts


def harm(backbone: Backbone, how: str) -> None:
    """What a careless editor leaves behind when it fails."""
    model = backbone.model
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "weights":
        with torch.no_grad():
            model.get_output_embeddings().weight += 1  # type: ignore[union-attr]
        return
    model.train()
    model.requires_grad_(True)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.register_forward_hook(lambda *_: 1 / 0)
    backbone.layers[0].register_forward_hook(lambda *_: 1 / 0)
