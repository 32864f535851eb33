"""T-Patcher: neurons added to the last FFN, each of which wakes for its own edit (arXiv 2301.09785).

A neuron adds `act(x k + b) v` to the FFN's output; where the FFN is gated, `act(x k + b) (x u + c) v`. x, its input, is
below all neurons, so a neuron changes nothing that another one sees.

N edits, P positions that predict a target token, m neurons of an edit, Q positions of memory, n neurons in all.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.activations import ACT2FN

from datamodules.records import EditRequest
from datamodules.tokens import encode, pad, pad_id
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.hypernetwork.batch import Scored, padded
from modules.interventions import Hook, hooked, shape
from modules.losses import head_of, mean_per_row, token_cross_entropy
from modules.training_free.shared import encode_targets, kept, load_state, save_state, to_make, tuning


class Neurons(NamedTuple):
    """Neurons with any leading shape, [n] or [N, m].

    Args:
        k, b: weights [..., d] and bias [...] of the activation.
        u, c: those of what it gates, where the FFN is gated; else of width 0 and unused.
        v: what an awake neuron adds [..., d].
    """

    k: Tensor
    b: Tensor
    u: Tensor
    c: Tensor
    v: Tensor

    def activation(self, x: Tensor) -> Tensor:
        """Before the activation function: x [..., T, d] -> [..., T, n]."""
        return x @ self.k.mT + self.b[..., None, :]

    def __call__(self, x: Tensor, act: nn.Module, there: Tensor | None = None) -> Tensor:
        """What is added to the FFN's output [..., T, d]; `there` [..., 1, n] silences the others."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.k.dtype)
            awake = act(self.activation(x))
            if self.u.shape[-1]:
                awake = awake * (x @ self.u.mT + self.c[..., None, :])
            return (awake if there is None else awake * there) @ self.v


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

    def act(self, backbone: Backbone) -> nn.Module:
        config = backbone.model.config
        own = getattr(config, "hidden_act", None) or config.activation_function
        return nn.ReLU() if self.relu else ACT2FN[own]

    def memory(self, backbone: Backbone) -> list[tuple[int, ...]]:
        """The tokens of the memory's texts."""
        if self.texts:
            return [encode(backbone.tokenizer, text).ids for text in self.texts]
        tokenizer, device = backbone.tokenizer, backbone.device
        first: Any = next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if isinstance(t, int)), 0)
        draw = torch.Generator().manual_seed(self.seed)
        ids = torch.full((self.samples, 1), first, dtype=torch.long, device=device)
        cache = DynamicCache(config=backbone.model.config)
        with torch.no_grad():
            for _ in range(self.sample_tokens):
                out = backbone.model.base_model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)
                p = backbone.logits(out.last_hidden_state[:, -1]).float().softmax(-1).cpu()
                ids = torch.cat([ids, torch.multinomial(p, 1, generator=draw).to(device)], 1)
        return [tuple(row) for row in ids.tolist()]

    def start(self, backbone: Backbone, count: int, size: int, dtype: torch.dtype = torch.float32) -> Neurons:
        """Neurons [N, m] for `count` edits; every edit starts alike, so that an edit alone is the edit among others."""
        d, d_out = ends(backbone)
        gated = d if len(backbone.parts.mlp) == 3 else 0
        draw = torch.Generator().manual_seed(self.seed)
        sizes = [(size, d), (size,), (size, gated), (size,), (size, d_out)]
        first = [self.init * torch.randn(s, generator=draw) for s in sizes]
        return Neurons(*(t.to(backbone.device, dtype).repeat(count, *[1] * t.dim()).requires_grad_() for t in first))


def ends(backbone: Backbone) -> tuple[int, int]:
    """Widths of what the last FFN takes and gives."""
    first, last = places(backbone)
    return shape(backbone.model, first)[0], shape(backbone.model, last)[1]


def places(backbone: Backbone) -> tuple[str, str]:
    """The last FFN's first and last linear layer."""
    parts = backbone.parts
    at = f"{parts.layers}.{len(backbone.layers) - 1}"
    return f"{at}.{parts.mlp[0]}", f"{at}.{parts.mlp[-1]}"


class Seen(NamedTuple):
    """What the last FFN takes and what the model ends in before its last norm, [R, T, d] each, and the mask [R, T]."""

    x: Tensor
    end: Tensor
    mask: Tensor


def look(backbone: Backbone, rows: Sequence[Sequence[int]]) -> Seen:
    """Run token ids through the model, right-padded."""
    found: dict[str, Tensor] = {}

    def keep(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        found["x"] = given[0]

    def keep_end(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        found["end"] = given[0]

    ids, mask = (t.to(backbone.device) for t in pad(rows, pad_id(backbone.tokenizer)))
    norm = backbone.model.get_submodule(backbone.parts.norm)
    with torch.no_grad(), hooked(backbone.model, {places(backbone)[0]: keep}), norm.register_forward_pre_hook(keep_end):
        backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    wide = torch.promote_types(found["x"].dtype, torch.float32)
    return Seen(found["x"].to(wide), found["end"], mask)


class Patched(Edited):
    """A backbone with neurons at its last FFN, which are there in its own passes alone.

    Args:
        requests: the edits.
        neurons: [n].
        of: the edit of each neuron [n].
    """

    def __init__(
        self,
        editor: TPatcher,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        neurons: Neurons | None = None,
        of: Tensor | None = None,
    ) -> None:
        super().__init__(backbone)
        self.editor = editor
        self.act = editor.act(backbone)
        self.requests = tuple(requests)
        self.neurons = neurons
        self.of = torch.zeros(0, dtype=torch.long) if of is None else of

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
            found, there = self._tune(rows, encode_targets(self.backbone, self.requests))
            edit, _ = there.nonzero(as_tuple=True)
            neurons = Neurons(*(t[there] for t in found))
            if self.neurons is not None:
                neurons = Neurons(*(torch.cat(pair) for pair in zip(self.neurons, neurons, strict=True)))
            of = torch.cat([self.of, edit.cpu() + len(self.requests)])
        return Patched(self.editor, self.backbone, [*self.requests, *new], neurons, of)

    def _tune(self, rows: Sequence[Scored], earlier: Sequence[Scored]) -> tuple[Neurons, Tensor]:
        """Neurons [N, m] without gradient, and which of them there are [N, m]."""
        editor, backbone = self.editor, self.backbone
        texts = look(backbone, editor.memory(backbone))
        memory = [texts.x[texts.mask.bool()]]
        for seen, row in ((look(backbone, [r.ids]), r) for r in earlier):
            memory.append(seen.x[0, row.start - 1 : -1])
        with self._awake():
            seen = look(backbone, [row.ids for row in rows])
        queries = Queries.of(backbone, rows, seen, editor.per == "token")
        neurons = editor.start(backbone, len(rows), queries.own.shape[2], seen.x.dtype)
        optimizer = torch.optim.Adam(neurons, lr=editor.lr)
        for _ in range(editor.steps):
            total = losses(editor, backbone, neurons, queries, torch.cat(memory), self.act).sum()
            if not bool(total.isfinite()):
                raise FloatingPointError(f"t_patcher: the loss is no number any more; lower lr ({editor.lr})")
            for leaf, gradient in zip(neurons, torch.autograd.grad(total, neurons, allow_unused=True), strict=True):
                leaf.grad = gradient
            optimizer.step()
        return Neurons(*(t.detach() for t in neurons)), queries.own.any(1)

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
        return Patched(self.editor, self.backbone, [self.requests[i] for i in rows], neurons, of)

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


class Queries(NamedTuple):
    """What neurons are tuned on.

    Args:
        x, end: see `Seen`, at the positions that predict a target token [N, P, d].
        labels: the tokens they are to predict [N, P].
        there: positions that an edit has [N, P].
        own: those that a neuron is to wake for [N, P, m].
    """

    x: Tensor
    end: Tensor
    labels: Tensor
    there: Tensor
    own: Tensor

    @classmethod
    def of(cls, backbone: Backbone, rows: Sequence[Scored], seen: Seen, per_token: bool) -> "Queries":
        device = seen.x.device
        ids, _, _ = (t.to(device) for t in padded(backbone.tokenizer, rows))
        size = torch.tensor([len(row.ids) - row.start for row in rows], device=device)
        at = torch.arange(int(size.max()), device=device)[None]  # [1, P]
        there = at < size[:, None]
        token = (torch.tensor([row.start for row in rows], device=device)[:, None] + at).clamp(max=ids.shape[1] - 1)
        row = torch.arange(len(rows), device=device)[:, None]
        each = torch.eye(at.shape[1], dtype=torch.bool, device=device)
        own = there[..., None] & (each if per_token else torch.ones_like(each[:, :1]))[None]
        return cls(seen.x[row, token - 1], seen.end[row, token - 1], ids[row, token], there, own)


def losses(
    editor: TPatcher, backbone: Backbone, neurons: Neurons, queries: Queries, memory: Tensor, act: nn.Module
) -> Tensor:
    """The loss of each edit [N]: its own, that of activation, and those of memory.

    Args:
        memory: [Q, d]; the queries of the other edits are added to it.
    """
    exists = queries.own.any(1)  # [N, m]
    patch = neurons(queries.x, act, exists[:, None].to(queries.x.dtype))
    norm = backbone.model.get_submodule(backbone.parts.norm)
    row, at = queries.there.nonzero(as_tuple=True)
    hidden = norm((queries.end[row, at] + patch[row, at]).to(queries.end.dtype))
    ce = token_cross_entropy(hidden, head_of(backbone.model), queries.labels[row, at])
    edit = mean_per_row(ce, row, len(queries.x))

    own = neurons.activation(queries.x)  # [N, P, m]
    mean = _mean(own, queries.own)  # [N, m]
    awake = _mean((-own).masked_fill(~queries.own, -torch.inf).exp(), queries.own)
    everything = torch.cat([memory, queries.x[queries.there]])  # [Q', d]
    mine = torch.cat([row.new_full((len(memory),), -1), row])[None, :, None] == row.new_tensor(
        range(len(queries.x))
    ).view(-1, 1, 1)
    m = neurons.activation(everything[None]).masked_fill(mine, -torch.inf)  # [N, Q', m]
    top = m.topk(min(editor.top, int((~mine[:, :, 0]).sum(1).min())), dim=1).values
    silent = (top - editor.silence).exp().mean(1) + (top - mean[:, None] - editor.gap).exp().mean(1)  # [N, m]
    per_neuron = editor.activation_weight * awake + editor.memory_weight * silent
    return edit + _mean(per_neuron[..., None], exists[..., None])[:, 0]


def _mean(values: Tensor, where: Tensor) -> Tensor:
    """Mean over dim 1 of [N, P, m] where it is true: [N, m]; 0 where it never is."""
    return (values * where).sum(1) / where.sum(1).clamp(min=1)
