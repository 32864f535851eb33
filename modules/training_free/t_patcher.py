"""T-Patcher: neurons added to the last FFN, each of which wakes for its own edit (arXiv 2301.09785).

A neuron adds `act(x k + b) v` to the FFN's output; where the FFN is gated, `act(x k + b) (x u + c) v`.

N edits, m neurons of an edit, n neurons in all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.hypernetwork.batch import Scored
from modules.interventions import Hook, hooked
from modules.training_free.neurons import LossWeights, Neurons, Queries, ends, look, losses, places, target_inputs
from modules.training_free.shared import encode_targets, kept, load_state, save_state, to_make, tuning
from modules.training_free.templates import sample


@dataclass
class TPatcher(Editor):
    """T-Patcher with the losses of its paper (section 3): the edit's, that of activation, and two of memory.

    All edits of a call are tuned side by side, each neuron with the other edits' queries in its memory beside the
    texts', earlier edits' among them.

    Args:
        per: neurons: one for an `edit` (UniEdit), or one for each `token` of its target (as released, where only a
            token that is wrong gets one). One neuron adds the same direction at each token, so it cannot do targets of
            several different ones.
        steps, lr: of Adam (UniEdit).
        activation_weight: of the loss `exp(-q)` of a neuron's own queries' activations q.
        memory_weight: of the memory losses: the mean of the `top` largest `exp(m - silence)` of memory's activations
            m, and of `exp(m - q - gap)`.
        silence, gap: what activations on memory are held below, and how far below the edit's own.
        top: how many of memory's positions are looked at.
        relu: neurons of their own activation function, which memory below 0 leaves exactly alone; else the FFN's.
        texts: of the memory; by default sampled from the model.
        samples, sample_tokens: how many texts are sampled, and their length.
        init: deviation of all weights at the start; at 0 the edit has no gradient.
        seed: of samples and start.
    """

    per: Literal["edit", "token"] = "edit"
    steps: int = 75
    lr: float = 1e-2
    activation_weight: float = 0.1
    memory_weight: float = 0.1
    silence: float = -3.0
    gap: float = -3.0
    top: int = 16
    relu: bool = False
    texts: list[str] = field(default_factory=list)
    samples: int = 8
    sample_tokens: int = 24
    init: float = 1e-2
    seed: int = 0

    name: ClassVar[str] = "t_patcher"

    def __post_init__(self) -> None:
        if min(self.steps, self.top, self.samples) < 1 or self.sample_tokens < 2 or min(self.lr, self.init) <= 0:
            raise ValueError(
                "t_patcher: steps, top and samples must be at least 1, sample_tokens at least 2, lr and init positive; "
                f"got {self}"
            )
        if self.per not in ("edit", "token"):
            raise ValueError(f"t_patcher: per must be edit or token, got {self.per!r}")

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["Patched"]:
        """Neurons for all requests.

        Raises:
            ValueError: for free text, or an edit that is too long.
            FloatingPointError: where a loss is no number.
        """
        yield Patched(self, backbone).add(requests)

    @property
    def weights(self) -> LossWeights:
        return LossWeights(self.activation_weight, self.memory_weight, self.silence, self.gap, self.top)

    def act(self, backbone: Backbone) -> nn.Module:
        config = backbone.model.config
        own = getattr(config, "hidden_act", None) or config.activation_function
        return nn.ReLU() if self.relu else ACT2FN[own]

    def memory(self, backbone: Backbone) -> list[tuple[int, ...]]:
        """The tokens of the memory's texts. Those of the model's own are drawn once for a Backbone object."""
        if self.texts:
            return [encode(backbone.tokenizer, text).ids for text in self.texts]
        known: dict[Any, list[tuple[int, ...]]] = vars(backbone).setdefault("_sampled", {})
        key = (self.seed, self.samples, self.sample_tokens)
        if key not in known:
            ids = backbone.tokenizer.bos_token_id, backbone.tokenizer.eos_token_id, 0
            starts = [[next(i for i in ids if isinstance(i, int))]] * self.samples
            draw = torch.Generator().manual_seed(self.seed)
            known[key] = [tuple(row) for row in sample(backbone, starts, self.sample_tokens + 1, None, draw)]
        return known[key]

    def start(self, backbone: Backbone, count: int, size: int, dtype: torch.dtype = torch.float32) -> Neurons:
        """Neurons [N, m] for `count` edits; every edit starts alike, so that an edit alone is the edit among others."""
        d, d_out = ends(backbone)
        gated = d if len(backbone.parts.mlp) == 3 else 0
        draw = torch.Generator().manual_seed(self.seed)
        sizes = [(size, d), (size,), (size, gated), (size,), (size, d_out)]
        first = [self.init * torch.randn(s, generator=draw) for s in sizes]
        return Neurons(*(t.to(backbone.device, dtype).repeat(count, *[1] * t.dim()).requires_grad_() for t in first))


class Patched(Edited):
    """A backbone with neurons at its last FFN, which are there in its own passes alone.

    Args:
        requests: the edits.
        neurons: [n].
        of: the edit of each neuron [n].
        inputs: `target_inputs` of the edits, which no neuron changes; by default found once they are needed.
    """

    def __init__(
        self,
        editor: TPatcher,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        neurons: Neurons | None = None,
        of: Tensor | None = None,
        inputs: Sequence[Tensor] | None = None,
    ) -> None:
        super().__init__(backbone)
        self.editor = editor
        self.act = editor.act(backbone)
        self.requests = tuple(requests)
        self.neurons = neurons
        self.of = torch.zeros(0, dtype=torch.long) if of is None else of
        self.inputs = inputs

    @property
    def shares_prefixes(self) -> bool:
        return True

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        with self._awake():
            return super().decode(ids, mask, state, **options)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        neurons, given = self.neurons, {}
        if neurons is None:
            yield
            return

        def take(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            given["x"] = inputs[0]

        def give(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return (output + neurons(given.pop("x"), self.act)).to(output.dtype)

        first, last = places(self.backbone)
        hooks: dict[str, Hook] = {first: take, last: give}  # type: ignore[dict-item]
        with hooked(self.backbone.model, hooks):
            yield

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["Patched"]:
        """The same with more edits, tuned beside the neurons that there are; none is repeated."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> "Patched":
        """See `edit`."""
        new = to_make(self.editor.name, requests, self.requests)
        rows = encode_targets(self.backbone, new)
        if not new:
            return self
        with tuning(self.backbone):
            earlier = self.inputs
            if earlier is None:
                earlier = target_inputs(self.backbone, encode_targets(self.backbone, self.requests))
            found, there, own = self._tune(rows, earlier)
            edit, _ = there.nonzero(as_tuple=True)
            neurons = Neurons(*(t[there] for t in found))
            if self.neurons is not None:
                neurons = Neurons(*(torch.cat(pair) for pair in zip(self.neurons, neurons, strict=True)))
            of = torch.cat([self.of, edit.cpu() + len(self.requests)])
        return Patched(self.editor, self.backbone, [*self.requests, *new], neurons, of, [*earlier, *own])

    def _tune(self, rows: Sequence[Scored], earlier: Sequence[Tensor]) -> tuple[Neurons, Tensor, list[Tensor]]:
        """Neurons [N, m] without gradient, which of them there are [N, m], and the edits' own inputs, see `Patched`.

        Args:
            earlier: those of earlier edits.
        """
        editor, backbone = self.editor, self.backbone
        texts = look(backbone, editor.memory(backbone))
        with self._awake():
            seen = look(backbone, [row.ids for row in rows])
        queries = Queries.of(backbone, rows, seen, editor.per == "token")
        neurons = editor.start(backbone, len(rows), queries.own.shape[2], seen.x.dtype)
        optimizer = torch.optim.Adam(neurons, lr=editor.lr)
        remembered = torch.cat([texts.x[texts.mask.bool()], *earlier])
        for _ in range(editor.steps):
            total = losses(editor.weights, backbone, neurons, queries, remembered, self.act).sum()
            if not bool(total.isfinite()):
                raise FloatingPointError(f"t_patcher: the loss is no number any more; lower lr ({editor.lr})")
            for leaf, gradient in zip(neurons, torch.autograd.grad(total, neurons, allow_unused=True), strict=True):
                leaf.grad = gradient
            optimizer.step()
        inputs = [x[there] for x, there in zip(queries.x, queries.there, strict=True)]
        return Neurons(*(t.detach() for t in neurons)), queries.own.any(1), inputs

    def remove(self, requests: Sequence[EditRequest]) -> "Patched":
        """The same without these edits' neurons.

        Raises:
            ValueError: for an edit that was not made.
        """
        rows = kept(self.requests, requests)
        number = {edit: i for i, edit in enumerate(rows)}
        stays = [i for i, edit in enumerate(self.of.tolist()) if edit in number]
        of = torch.tensor([number[int(self.of[i])] for i in stays], dtype=torch.long)
        neurons = Neurons(*(t[stays] for t in self.neurons)) if self.neurons is not None and stays else None
        inputs = self.inputs and [self.inputs[i] for i in rows]
        return Patched(self.editor, self.backbone, [self.requests[i] for i in rows], neurons, of, inputs)

    def save(self, folder: Path) -> None:
        """Write edits.safetensors and edits.json to a folder."""
        tensors = {} if self.neurons is None else self.neurons._asdict()
        save_state(folder, type(self.editor).name, self.requests, {**tensors, "of": self.of})

    def restored(self, folder: Path) -> "Patched":
        """The same method and backbone with the edits that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or those of another method or model.
        """
        requests, tensors = load_state(folder, type(self.editor).name, self.backbone.device)
        of = tensors.pop("of").cpu()
        if tensors and (tensors["k"].shape[1], tensors["v"].shape[1]) != ends(self.backbone):
            raise ValueError(f"the edits in {folder} are of a model of another size; make them again")
        return Patched(self.editor, self.backbone, requests, Neurons(**tensors) if tensors else None, of)
