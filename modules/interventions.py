"""Edits as low-rank terms: `x W + (x aᵀ) b` in the forward pass, with W never written to.

A term is added to the output of a linear layer by a forward hook for the length of a `with`, so nothing has to be put
back; each row of a batch may have a term of its own. What is computed inside that `with` under gradient checkpointing
may be run again after it: the layers then see the terms of their first run (`recomputed`).

B rows, T tokens, r rank, n tokens of several edits side by side.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]
Term = Callable[[Tensor], Tensor]  # a linear layer's input -> what is added to its output: a `LowRank`, or the like


def linear(model: nn.Module, name: str) -> nn.Module:
    """The linear layer of that name: an nn.Linear, or the Conv1D of GPT-2, whose weight is the transpose.

    Raises:
        ValueError: where there is none; it names the layer.
    """
    try:
        layer = model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{type(model).__name__} has no layer {name!r} to edit") from error
    if not isinstance(layer, nn.Linear | Conv1D):
        raise ValueError(f"layer {name!r} is a {type(layer).__name__}; only linear layers can be edited")
    return layer


def shape(model: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a linear layer."""
    layer = linear(model, name)
    names = ("in_features", "out_features") if isinstance(layer, nn.Linear) else ("nx", "nf")
    d_in, d_out = (int(getattr(layer, n)) for n in names)
    return d_in, d_out


@dataclass(frozen=True)
class LowRank:
    """What is added to a linear layer's output: `(x aᵀ) b`. The weight [d_in, d_out] it stands for is `aᵀ b`.

    Args:
        a: [B, r, d_in]; B = 1: one term for all rows.
        b: [B, r, d_out].
    """

    a: Tensor
    b: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., d_in] of as many rows, or of any number where B = 1 -> [..., d_out], in the factors' precision."""
        if len(self.a) not in (1, len(x)):
            raise ValueError(f"a term of {len(self.a)} rows met a batch of {len(x)}")
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.a.dtype)
            if len(self.a) == 1:
                return (x @ self.a[0].T) @ self.b[0]
            return (x @ self.a.transpose(1, 2)) @ self.b

    def __getitem__(self, rows: Tensor) -> "LowRank":
        """The terms of chosen rows, each as often as it is chosen."""
        return LowRank(self.a[rows], self.b[rows])

    def weight(self) -> Tensor:
        """The change of the weight, [B, d_in, d_out]."""
        with torch.autocast(self.a.device.type, enabled=False):
            return self.a.transpose(1, 2) @ self.b

    def compact(self) -> "LowRank":
        """The same term with a rank of at most d_in and d_out."""
        (count, rank, d_in), d_out = self.a.shape, self.b.shape[2]
        if rank <= min(d_in, d_out):
            return self
        whole = self.weight()
        one = torch.eye(min(d_in, d_out), dtype=self.a.dtype, device=self.a.device).expand(count, -1, -1)
        return LowRank(one, whole) if d_in <= d_out else LowRank(whole.transpose(1, 2), one)


class Deltas(NamedTuple):
    """Edits of one linear layer, token by token: each token adds the rank-one weight `aᵀ b`.

    Args:
        a: [n, d_in].
        b: [n, d_out].
        edit: the edit that each token belongs to [n].
    """

    a: Tensor
    b: Tensor
    edit: Tensor

    def term(self, count: int, row: Tensor | None = None) -> LowRank:
        """The tokens as a term of `count` rows. Edits in the same row are added up, as a batch of edits is.

        Args:
            row: the row of each edit; by default an edit's number is its row.
        """
        at = self.edit if row is None else row[self.edit]  # [n]
        order = at.argsort(stable=True)
        sizes = torch.bincount(at, minlength=count)
        first = sizes.cumsum(0) - sizes
        place = torch.empty_like(at)
        place[order] = torch.arange(len(at), device=at.device) - first[at[order]]
        rank = int(sizes.max()) if len(at) else 1
        return LowRank(*(x.new_zeros(count, rank, x.shape[1]).index_put((at, place), x) for x in (self.a, self.b)))

    def to(self, device: torch.device) -> "Deltas":
        return Deltas(self.a.to(device), self.b.to(device), self.edit.to(device))

    def keep(self, edits: Tensor) -> "Deltas":
        """Only these edits, numbered in this order."""
        number = torch.full((int(self.edit.max()) + 1 if len(self.edit) else 0,), -1, device=edits.device)
        inside = edits < len(number)  # an edit may have no token at all
        number[edits[inside]] = torch.arange(len(edits), device=edits.device)[inside]
        kept = number[self.edit] >= 0
        return Deltas(self.a[kept], self.b[kept], number[self.edit[kept]])

    @classmethod
    def joined(cls, parts: "Sequence[Deltas]", count: int) -> "Deltas":
        """All edits of these parts in their order; each part but the last has `count` of them."""
        edit = torch.cat([part.edit + i * count for i, part in enumerate(parts)])
        return cls(torch.cat([part.a for part in parts]), torch.cat([part.b for part in parts]), edit)

    def then(self, more: "Deltas", count: int) -> "Deltas":
        """These edits, `count` of them, and more."""
        return Deltas(
            torch.cat([self.a, more.a]), torch.cat([self.b, more.b]), torch.cat([self.edit, more.edit + count])
        )


# ---------------------------------------------------------------------- hooks for the length of a `with`


class _Hooks:
    """A set of hooks that can be put on and taken off a model."""

    def __init__(self, model: nn.Module, hooks: Mapping[str, Hook]) -> None:
        self.places = [(linear(model, name), hook) for name, hook in hooks.items()]
        self.handles: list[RemovableHandle] = []

    def on(self) -> None:
        self.handles = [layer.register_forward_hook(hook) for layer, hook in self.places]

    def off(self) -> None:
        for handle in self.handles:
            handle.remove()


# what is on now. One list for all threads: on CUDA the backward pass, and what it runs again, has threads of its own
_on: list[_Hooks] = []


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Hook]) -> Iterator[None]:
    """Forward hooks on linear layers, by name, for the length of a `with`; those of an outer `with` come first.

    Raises:
        ValueError: for a name that is no linear layer, before anything is changed.
    """
    mine = _Hooks(model, hooks)
    mine.on()
    _on.append(mine)
    try:
        yield
    finally:
        _on.remove(mine)
        mine.off()


@contextmanager
def low_rank(model: nn.Module, terms: Mapping[str, Term]) -> Iterator[None]:
    """Add terms to the outputs of linear layers, by name, for the length of a `with`.

    The sum is rounded once, to the precision of the layer's output.
    """

    def adding(term: Term) -> Hook:
        # the layer's own output goes into the sum: ZeRO-3 brings weights back for the backward pass by what hangs on it
        return lambda _, inputs, output: (output + term(inputs[0])).to(output.dtype)

    with hooked(model, {name: adding(term) for name, term in terms.items()}):
        yield


def recomputed() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """The `context_fn` of torch's checkpoint: what is run again has exactly the hooks that it had the first time."""
    then = tuple(_on)

    @contextmanager
    def again() -> Iterator[None]:
        now = tuple(_on)
        if now == then:
            yield
            return
        _swap(then)
        try:
            yield
        finally:
            _swap(now)

    return nullcontext(), again()


def _swap(wanted: tuple[_Hooks, ...]) -> None:
    for hooks in _on:
        hooks.off()
    _on[:] = wanted
    for hooks in wanted:
        hooks.on()


@contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Layers that run within are run again in the backward pass, wherever that is, hooks and all. The model stays in
    eval mode (no dropout); outside of this it generates with a cache, which checkpointing would refuse."""
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
    model.disable_input_require_grads()  # else the backward pass would not end at the lowest edited layer
    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    try:
        for layer in layers:
            layer.training = True  # the layer alone, which is what turns recomputation on; not its parts
        yield
    finally:
        for layer in layers:
            layer.training = False
        model.gradient_checkpointing_disable()


# ---------------------------------------------------------------------- for good


@torch.no_grad()
def merge(model: nn.Module, terms: Mapping[str, LowRank | Tensor]) -> None:
    """Fold changes into the weights: terms of one row, or matrices [d_in, d_out]. There is no way back: give it a copy.

    Raises:
        ValueError: for a term of several rows, which no one weight can stand for, before anything is changed.
    """
    layers = {name: linear(model, name) for name in terms}
    for name, term in terms.items():
        if isinstance(term, LowRank) and len(term.a) != 1:
            raise ValueError(f"the term of {name!r} has {len(term.a)} rows; add them up before merging")
    for name, layer in layers.items():
        term = terms[name]
        change = term.weight()[0] if isinstance(term, LowRank) else term  # [d_in, d_out]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        weight.copy_(weight + (change.T if isinstance(layer, nn.Linear) else change).to(weight.device))


def merged(model: PreTrainedModel, changes: Mapping[str, LowRank | Tensor]) -> PreTrainedModel:
    """A copy of a model with changes in its weights, in its precision; see `merge`."""
    found = copy.deepcopy(model)
    merge(found, changes)
    return found
