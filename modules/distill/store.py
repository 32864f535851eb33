"""The teacher's distributions on disk: files of a few records each, named by all that they are made of.

A file that is there is not made again: not by a run that goes on, and not by another one on the same edits. Ranks share
out the files that are missing; each reads all of them.

n tokens, d hidden width, k kept tokens.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modules.backbone import Backbone
from modules.distill.loss import Full, Taught, Top, top_of
from modules.distill.queries import Question
from modules.distill.teacher import Asked, last_states
from modules.kept_tensors import CACHE_FOLDER, folder, write
from modules.losses import CHUNK, head_of

VERSION = 1  # of what is kept: a change makes old files unknown
BLOCK = 16  # records of one file


@dataclass
class Teaching:
    """How the teacher's distributions are made and kept.

    Args:
        top_k: keep the probabilities of so many tokens, and of all others together. By default distributions are kept
            whole, as the last hidden states from which the frozen head makes them: d numbers a token.
        batch_size: questions of one pass. Each holds its own copy of keys and values of the text before it.
        folder: of the files; by default distill/ in the folder that the environment variable PALIMPSEST_CACHE names, or
            in ~/.cache/palimpsest. All machines of a job must share it.
    """

    top_k: int | None = None
    batch_size: int = 16
    folder: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.top_k is not None and self.top_k < 1):
            raise ValueError(
                f"model.teaching.top_k and batch_size must be at least 1, got {self.top_k}, {self.batch_size}"
            )

    def where(self) -> Path:
        """The folder of the files."""
        if self.folder:
            return Path(self.folder).expanduser()
        return folder() / "distill"


def file_of(options: Teaching, backbone: Backbone, weights: str, asked: Sequence[Asked]) -> Path:
    """Where the answers to some questions are kept: under a name made of the model, the settings and all tokens.

    Args:
        weights: a hash of the model's.
    """
    what: list[Any] = [VERSION, weights, options.top_k, [[a.context, *a.question, a.row.ids] for a in asked]]
    key = sha256(json.dumps(what).encode()).hexdigest()[:24]
    return options.where() / f"taught-{backbone.model.config.model_type}-{key}.safetensors"


def teach(
    options: Teaching,
    backbone: Backbone,
    asked: Sequence[Asked],
    file: Path,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Ask the teacher some questions, and keep its answers in a file."""
    states = last_states(backbone, asked, options.batch_size, progress)
    sizes = [len(state) for state in states]
    kept = _kept(backbone, torch.cat(states), options.top_k)
    kept["sizes"] = torch.tensor(sizes)
    kept["in_scope"] = torch.tensor([a.context is not None for a in asked])
    write(file, kept, {"questions": json.dumps([a.question for a in asked], ensure_ascii=False)})


@torch.no_grad()
def _kept(backbone: Backbone, hidden: Tensor, top_k: int | None) -> dict[str, Tensor]:
    if top_k is None:
        return {"hidden": hidden}
    head, parts = head_of(backbone.model), []
    for h in hidden.split(CHUNK):
        top, unseen = top_of(head.log_probs(h.to(backbone.device)), top_k)
        parts.append([t.cpu() for t in (top.log_probs, top.tokens.int(), top.rest, unseen)])
    names = ("log_probs", "tokens", "rest", "unseen")
    return {name: torch.cat(column) for name, column in zip(names, zip(*parts, strict=True), strict=True)}


@dataclass(frozen=True)
class _Place:
    """Where a question's answer lies: its file's tensors, its tokens there, and whether it is in scope."""

    tensors: dict[str, Tensor]
    first: int
    size: int
    in_scope: bool


class Answered:
    """The teacher's answers, mapped into memory from their files.

    Raises:
        ValueError: for a file that is missing or cannot be read.
    """

    def __init__(self, files: Sequence[Path | str]) -> None:
        self.places: dict[Question, _Place] = {}
        self._unseen: list[Tensor] = []
        self._rest: list[Tensor] = []
        for file in files:
            tensors, questions = _read(Path(file))
            sizes, in_scope = tensors.pop("sizes").tolist(), tensors.pop("in_scope").tolist()
            if "unseen" in tensors:
                self._unseen.append(tensors.pop("unseen"))
                self._rest.append(tensors["rest"])
            first = 0
            for question, size, inside in zip(questions, sizes, in_scope, strict=True):
                self.places[question] = _Place(tensors, first, size, inside)
                first += size

    def __len__(self) -> int:
        return len(self.places)

    def look_up(self, questions: Sequence[Question], device: torch.device) -> tuple[Taught, Tensor]:
        """The distributions at the targets of some questions, one after the other [n tokens], and which of the
        questions are in scope.

        Raises:
            KeyError: for one that was never asked.
        """
        places = [self.places[q] for q in questions]

        def joined(name: str) -> Tensor:
            return torch.cat([p.tensors[name][p.first : p.first + p.size] for p in places]).to(device)

        inside = torch.tensor([p.in_scope for p in places], device=device)
        if "hidden" in places[0].tensors:
            return Full(joined("hidden")), inside
        return Top(joined("log_probs"), joined("tokens").long(), joined("rest")), inside

    def said(self) -> str:
        """In one line: how many questions, how many of them in scope, and the error of keeping a part."""
        inside = sum(place.in_scope for place in self.places.values())
        text = f"{len(self.places):,} questions, {inside:,} of them in scope"
        if self._unseen:
            rest, unseen = torch.cat(self._rest).exp(), torch.cat(self._unseen)
            text += (
                f"; outside of the kept tokens a probability of {rest.mean():.2g} (at most {rest.max():.2g}), which "
                f"hides {unseen.mean():.2g} (at most {unseen.max():.2g}) nats of divergence from a student that knows "
                "nothing of it"
            )
        return text


def _read(file: Path) -> tuple[dict[str, Tensor], list[Question]]:
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: the folder of the teacher's answers must be shared by all machines of a job "
            f"(model.teaching.folder, or {CACHE_FOLDER})"
        )
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            questions = json.loads((opened.metadata() or {})["questions"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}; remove it, and it is made again") from error
    return tensors, [Question(*q) for q in questions]
