"""Editors that tune a change of the weights on the edits themselves: what FT and LoRA share.

The change is held apart from the weights, `x W + x D` or `x W + (x A) B`, and gradients are taken of it alone. Edits of
one call share one change; or each has a change of its own, and then many train at once without seeing each other. What
layers below the lowest changed one compute is the same in every step and is computed once: their outputs are held, d
numbers a token.

N edits, G changes (1, or N), B rows, T tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.hypernetwork.batch import Scored
from modules.interventions import LowRank, low_rank, merged, shape
from modules.training_free.locate import layer_of
from modules.training_free.prepared import Prepared, Prompt, prepare, prepare_rows
from modules.training_free.shared import encode_targets, load_state, save_state, to_make, tuning
from modules.training_free.subject import Row
from modules.training_free.terms import Dense, Term, detached, row_of, shape_of, together

Objective = Literal["target", "prompt_last"]


class Change(ABC):
    """What is tuned.

    Attributes:
        leaves: tensors [G, ...] that take gradients.
        settled: whether the loss may end the tuning yet.
        passes: over all edits, so far.
    """

    leaves: list[Tensor]
    settled = True
    passes = 0

    @abstractmethod
    def terms(self) -> dict[str, Term]:
        """What is added to each layer, by name; a function of the leaves."""

    def penalty(self) -> Tensor:
        """What is added to the loss of each change [G]."""
        return self.leaves[0].new_zeros(len(self.leaves[0]))

    @abstractmethod
    def step(self, gradients: Sequence[Tensor]) -> None:
        """Called after each step of Adam, with the gradients that it took; may constrain the leaves."""

    def passed(self) -> None:
        """Called after each pass over all edits, of a step or several."""
        self.passes += 1


def ready(
    backbone: Backbone, rows: Sequence[Scored], objective: Objective, names: Sequence[str], apart: bool = False
) -> list[Prepared]:
    """Edits, numbered in their order, for passes that begin at the lowest of the layers that change.

    Args:
        objective: `target`: each token is predicted from those before it; `prompt_last`: all of them are predicted at
            the prompt's last token.
        names: of the linear layers that change.
        apart: in one pass and in their order, as changes of one row each need them; else in passes of little padding.
    """
    start = min(layer_of(backbone, name) for name in names)
    prompts = [Prompt(Row(r.ids, 0, r.start), e, 1.0) for e, r in enumerate(rows)]
    passes = [prepare_rows(backbone, prompts, start)] if apart else prepare(backbone, prompts, start, len(prompts))
    if objective == "target":
        return passes
    last = torch.tensor([r.start - 1 for r in rows], device=backbone.device)
    return [replace(one, at=last[one.edit[one.row]]) for one in passes]


def edit_losses(backbone: Backbone, passes: Sequence[Prepared]) -> Tensor:
    """The loss of each edit [N]: the mean cross-entropy of its target's tokens, by the model as it is at the time."""
    count = sum(len(one.edit) for one in passes)
    return torch.stack([one.losses(backbone, lambda hidden: hidden, count) for one in passes]).sum(0)


@dataclass
class TuningEditor(Editor):
    """An editor that tunes a change of the weights on the edits.

    Args:
        steps: of Adam; with more edits than `batch_size`, passes over all of them.
        lr: of Adam.
        stop_at: a batch whose loss is below this takes no further step; 0: none ever stops.
        batch_size: edits of one step.
        seed: of what starts at random.
    """

    steps: int = 25
    lr: float = 5e-4
    stop_at: float = 1e-2
    batch_size: int = 32
    seed: int = 0

    name: ClassVar[str]
    objective: ClassVar[Objective] = "target"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or self.stop_at < 0:
            raise ValueError(
                f"{self.name}: steps and batch_size must be at least 1, lr positive and stop_at not negative; got "
                f"{self.steps}, {self.batch_size}, {self.lr}, {self.stop_at}"
            )

    @abstractmethod
    def names(self, backbone: Backbone) -> list[str]:
        """The linear layers that are changed.

        Raises:
            ValueError: for layers that the model does not have.
        """

    @abstractmethod
    def start(self, backbone: Backbone, count: int) -> Change:
        """`count` changes that change nothing yet."""

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["Tuned"]:
        """One change for all requests.

        Raises:
            ValueError: for free text, an edit that is too long, or layers that the model does not have.
            FloatingPointError: where the loss is no number.
        """
        yield Tuned(self, backbone).add(requests)

    def apart(self, backbone: Backbone, requests: Sequence[EditRequest]) -> list["Tuned"]:
        """Single edits, each from the unedited model, `batch_size` of them tuned at once: an edited model of each.

        Raises:
            ValueError, FloatingPointError: see `edit`.
        """
        to_make(self.name, requests)
        rows = encode_targets(backbone, requests)
        found = []
        for at in range(0, len(rows), self.batch_size):
            terms = self.tune(backbone, rows[at : at + self.batch_size], apart=True)
            with torch.inference_mode(False):  # in which made, a term could not be tuned on top of
                for i, request in enumerate(requests[at : at + self.batch_size]):
                    own = {name: row_of(term, i) for name, term in terms.items()}
                    found.append(Tuned(self, backbone, [request], own))
        return found

    def tune(self, backbone: Backbone, rows: Sequence[Scored], apart: bool = False) -> dict[str, Term]:
        """Tune one change on all rows, or one on each of them.

        Returns:
            The terms, without gradient.
        """
        with tuning(backbone):
            change = self.start(backbone, len(rows) if apart else 1)
            optimizer = torch.optim.Adam(change.leaves, lr=self.lr)
            size = len(rows) if apart else self.batch_size
            names = self.names(backbone)
            parts = [rows[at : at + size] for at in range(0, len(rows), size)]
            batches = [ready(backbone, part, self.objective, names, apart) for part in parts]
            for _ in range(self.steps):
                stepped = [self._step(backbone, batch, change, optimizer, apart) for batch in batches]
                if not any(stepped):
                    break
                change.passed()
            return {name: detached(term) for name, term in change.terms().items()}

    def _step(
        self, backbone: Backbone, edits: Sequence[Prepared], change: Change, optimizer: torch.optim.Adam, apart: bool
    ) -> bool:
        """Whether any change had a step to take."""
        with low_rank(backbone.model, change.terms()):
            losses = edit_losses(backbone, edits)  # [N]
            losses = (losses if apart else losses.mean()[None]) + change.penalty()  # [G]
            if not bool(losses.isfinite().all()):
                raise FloatingPointError(f"{self.name}: the loss is no number any more; lower lr ({self.lr})")
            done = (losses < self.stop_at) & change.settled
            if bool(done.all()):
                return False
            gradients = torch.autograd.grad(losses.sum(), change.leaves)
        before = [leaf.detach()[done] for leaf in change.leaves]
        for leaf, gradient in zip(change.leaves, gradients, strict=True):
            leaf.grad = gradient
        optimizer.step()
        with torch.no_grad():
            change.step(gradients)
            for leaf, old in zip(change.leaves, before, strict=True):
                leaf[done] = old  # Adam moves on without a gradient too
        return True


class Tuned(Edited):
    """A backbone with a tuned change, which is there in its own passes alone.

    The edits of one call share one change, in which none can be told from the others: single ones cannot be removed.

    Args:
        requests: the edits that share the change.
        terms: what is added to each layer, of one row.
    """

    def __init__(
        self,
        editor: TuningEditor,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        terms: Mapping[str, Term] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.editor = editor
        self.requests = tuple(requests)
        self.terms = dict(terms or {})

    @property
    def shares_prefixes(self) -> bool:
        return True

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        with low_rank(self.backbone.model, self.terms):
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["Tuned"]:
        """The same with more edits, tuned on top of the model as it is edited now; the constraint, where there is one,
        holds for each call's own change, as released."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> "Tuned":
        """See `edit`; an edit that is there already is not repeated."""
        new = to_make(self.editor.name, requests, self.requests)
        rows = encode_targets(self.backbone, new)
        self.editor.names(self.backbone)
        if not new:
            return self
        with torch.inference_mode(False), low_rank(self.backbone.model, self.terms):
            found = self.editor.tune(self.backbone, rows)
            terms = {name: together(self.terms[name], t) if name in self.terms else t for name, t in found.items()}
        return Tuned(self.editor, self.backbone, [*self.requests, *new], terms)

    def weight_changes(self) -> Mapping[str, LowRank | Tensor]:
        """What all edits so far add to each weight, by the linear layer's name: a term of one row, or [d_in, d_out]."""
        return {name: term.d[0] if isinstance(term, Dense) else term for name, term in self.terms.items()}

    def merge(self) -> PreTrainedModel:
        """A plain model with the edits in its weights, in the backbone's precision; the backbone stays as it is."""
        return merged(self.backbone.model, self.weight_changes())

    def save(self, folder: Path) -> None:
        """Write edits.safetensors and edits.json to a folder."""
        flat = {f"{name}.{part}": tensor for name, term in self.terms.items() for part, tensor in vars(term).items()}
        save_state(folder, type(self.editor).name, self.requests, flat)

    def restored(self, folder: Path) -> "Tuned":
        """The same method and backbone with the edits that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or those of another method or model.
        """
        requests, flat = load_state(folder, type(self.editor).name, self.backbone.device)
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            name, _, part = key.rpartition(".")
            parts.setdefault(name, {})[part] = tensor
        terms: dict[str, Term] = {name: Dense(**p) if "d" in p else LowRank(**p) for name, p in parts.items()}
        for name, term in terms.items():
            if shape_of(term) != shape(self.backbone.model, name):
                raise ValueError(f"the edits in {folder} are of a model of another size; make them again")
        return Tuned(self.editor, self.backbone, requests, terms)
