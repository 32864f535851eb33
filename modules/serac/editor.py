"""SERAC as an editor: a memory of edits beside two models, and a choice between them for every prompt.

A prompt's scope is decided once, by the prompt alone: whatever is then scored or generated after it comes from one
model. Out of scope that is the base model, in batches of its own, so that its answers are what they were, bit by bit.

N edits, d width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.asked import question_of
from modules.backbone import Backbone
from modules.editor import Edited, TargetScore, TrainedEditor
from modules.fingerprint import weights_hash
from modules.saved_edits import kept_without, read_edits, write_edits
from modules.serac.mixture import Mixture
from modules.serac.model import SeracModel, same_tokens

CLASSIFIER = "classifier"  # in the metadata of saved vectors: which weights made them


class Scope(NamedTuple):
    """What the classifier says of a prompt: the most similar edit, and how similar it is. Without edits: none, 0."""

    request: EditRequest | None
    similarity: float


class SeracEdited(Edited):
    """A backbone beside a memory of edits.

    Args:
        requests: the edits.
        vectors: theirs [N, d], as the classifier compares them.
        soft: answer with a mixture of both models, weighted by similarity, in place of a choice (EasyEdit).
    """

    reads_prompts = True

    def __init__(
        self,
        model: SeracModel,
        backbone: Backbone,
        soft: bool = False,
        requests: Sequence[EditRequest] = (),
        vectors: Tensor | None = None,
    ) -> None:
        super().__init__(backbone)
        self.model = model
        self.soft = soft
        self.requests = tuple(requests)
        encoder = model.scope.encoder
        self.vectors = torch.empty(0, encoder.width, device=encoder.device) if vectors is None else vectors
        self._base, self._counterfactual = Edited(backbone), Edited(model.counterfactual)

    # ------------------------------------------------------------------ answers

    @torch.no_grad()
    def scope(self, prompts: Sequence[str]) -> list[Scope]:
        """The nearest edit of each prompt, or of the question that it ends with after solved ones. It is in scope where
        its similarity is above the classifier's threshold."""
        if not self.requests or not prompts:
            return [Scope(None, 0.0)] * len(prompts)
        distinct = list(dict.fromkeys(prompts))
        classifier = self.model.scope
        vectors = classifier.encoder.embed([question_of(prompt) for prompt in distinct])
        similarity, edit = classifier.nearest(vectors, self.vectors.to(vectors))
        rows = zip(edit.tolist(), similarity.tolist(), strict=True)
        found = {p: Scope(self.requests[i], s) for p, (i, s) in zip(distinct, rows, strict=True)}
        return [found[prompt] for prompt in prompts]

    def edit_of(self, prompts: Sequence[str]) -> list[EditRequest | None]:
        """The edit that answers each prompt, or None where the base model does."""
        limit = self.model.scope.config.threshold
        return [scope.request if scope.similarity > limit else None for scope in self.scope(prompts)]

    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        if self.soft and self.requests:
            return self._mixture(prompts).score(prompts, targets, batch_size, top_k)
        asked = list(zip(prompts, targets, strict=True))
        scores: dict[int, TargetScore] = {}
        for model, rows, given in self._parts(prompts):
            found = model.score(given, [asked[i][1] for i in rows], batch_size, top_k)
            scores |= zip(rows, found, strict=True)
        return [scores[i] for i in range(len(asked))]

    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        if self.soft and self.requests:
            return self._mixture(prompts).generate(prompts, max_new_tokens, batch_size)
        texts: dict[int, str] = {}
        for model, rows, given in self._parts(prompts):
            texts |= zip(rows, model.generate(given, max_new_tokens, batch_size), strict=True)
        return [texts[i] for i in range(len(prompts))]

    def context_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The edit's statement, in scope; with the soft mixture that of the nearest edit always."""
        edits = [s.request for s in self.scope(prompts)] if self.soft else self.edit_of(prompts)
        tokenizer = self.backbone.tokenizer
        return [len(encode(tokenizer, edit.statement, bos=False).ids) if edit else 0 for edit in edits]

    def _parts(self, prompts: Sequence[str]) -> Iterator[tuple[Edited, list[int], list[str]]]:
        """The two models, which prompts each of them answers, and what it is given."""
        edits = self.edit_of(prompts)
        outside = [i for i, edit in enumerate(edits) if edit is None]
        inside = {i: f"{edit.statement} {prompts[i]}" for i, edit in enumerate(edits) if edit is not None}
        if outside:
            yield self._base, outside, [prompts[i] for i in outside]
        if inside:
            yield self._counterfactual, list(inside), list(inside.values())

    def _mixture(self, prompts: Sequence[str]) -> Mixture:
        found = dict(zip(prompts, self.scope(prompts), strict=True))
        contexts = {p: (s.request.statement, s.similarity) for p, s in found.items() if s.request is not None}
        return Mixture(self.backbone, self.model.counterfactual, contexts)

    # ------------------------------------------------------------------ edits

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator[Self]:
        """The same with more edits. One that is there already is not repeated; of two with the same prompt the later
        one counts."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> Self:
        """See `edit`."""
        known = set(self.requests)
        new = [r for r in {_key(r): r for r in requests}.values() if r not in known]
        replaced = {_key(r) for r in new}
        kept = [i for i, r in enumerate(self.requests) if _key(r) not in replaced]
        with torch.inference_mode(False):
            vectors = self.model.scope.encoder.embed([self.model.scope.config.text(r) for r in new])
        return self._with([*(self.requests[i] for i in kept), *new], torch.cat([self.vectors[kept], vectors]))

    def remove(self, requests: Sequence[EditRequest]) -> Self:
        """The same without these edits.

        Raises:
            ValueError: for an edit that was not made.
        """
        kept = kept_without(self.requests, requests)
        return self._with([self.requests[i] for i in kept], self.vectors[kept])

    def _with(self, requests: Sequence[EditRequest], vectors: Tensor) -> Self:
        return type(self)(self.model, self.backbone, self.soft, requests, vectors)

    def save(self, folder: Path) -> None:
        """Write edits.json (the edits as text) and memory.safetensors (their vectors) to a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        made_by = {CLASSIFIER: weights_hash(self.model.scope)}
        save_file({"vectors": self.vectors.cpu().contiguous()}, folder / "memory.safetensors", metadata=made_by)
        write_edits(folder, self.requests)

    def restored(self, folder: Path) -> Self:
        """The same models with the edits that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or those of another classifier.
        """
        requests = read_edits(folder, "memory.safetensors")
        file = folder / "memory.safetensors"
        try:
            vectors = load_file(file, device=str(self.model.scope.encoder.device))["vectors"]
            with safe_open(file, "pt") as opened:
                made_by = (opened.metadata() or {}).get(CLASSIFIER)
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file} cannot be read: {error}; make its edits again") from error
        if made_by != weights_hash(self.model.scope):
            raise ValueError(f"the edits in {folder} were made with another scope classifier; make them again")
        if len(vectors) != len(requests):
            raise ValueError(f"{folder}: edits.json lists {len(requests)} edits, memory.safetensors {len(vectors)}")
        return self._with(requests, vectors)


class SeracEditor(TrainedEditor):
    """The editor of a trained classifier and counterfactual model. It edits any model that has their vocabulary.

    Args:
        soft: see `SeracEdited`.
    """

    name = "serac"

    def __init__(self, model: SeracModel, soft: bool = False) -> None:
        self.model = model
        self.soft = soft

    @property
    def reader(self) -> Backbone:
        return self.model.reader

    def to(self, device: torch.device) -> None:
        self.model.to(device)
        self.model.backbone.model.to(device)  # type: ignore[arg-type]

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[SeracEdited]:
        own = self.model.counterfactual
        if backbone.tokenizer is not self.model.backbone.tokenizer:
            same_tokens(backbone.tokenizer, backbone.config.source, own.tokenizer, own.config.source)
        yield SeracEdited(self.model, backbone, self.soft).add(requests)


def _key(request: EditRequest) -> str:
    """What an edit is about: its prompt, or all of a text without one."""
    return request.prompt or request.statement
