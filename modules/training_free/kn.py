"""Knowledge Neurons: the FFN neurons that an answer hangs on are found, and their values moved from the old answer's
embedding towards the new one's (Dai et al., arXiv 2104.08696; for decoders as released by EleutherAI and EasyEdit).

L layers, f FFN width, d hidden width, S steps of the integral, R rows of one pass.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Editor
from modules.from_layer import entering, from_layer
from modules.hypernetwork.batch import scored
from modules.interventions import Deltas, linear
from modules.training_free.locate import layer_of
from modules.training_free.method_edited import MethodEdited
from modules.training_free.shared import encode_targets, to_make, tuning

Before = Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]


@dataclass
class KN(Editor):
    """Knowledge Neurons.

    The attribution of a neuron with activation w at the prompt's last token is w times the integral, over a from 0 to
    1, of the gradient of the old answer's probability by that activation, where those of its layer are a times what
    they are (equation 2 of the paper). With an answer of several tokens each is predicted after those before it, and
    the attributions are averaged. The release also asks other prompts, and keeps neurons that a share of them has; a
    request has one prompt.

    Args:
        steps: of the integral, by the midpoint rule, whose error falls with their square. As released they start at 0.
        threshold: neurons with an attribution above this share of the largest are taken.
        erase, write: multiples of the old and the new answer's embeddings that each of these neurons' values loses and
            gains, summed over the answer's tokens. 2 as released for answers of one token (1 for longer ones); 1 and 8
            in the paper.
        embedding: `output`: of the model's head, along which a value raises its token, and which in the paper's model
            is the input's too; `input`, as released. The same where the model ties them.
        batch_size: rows of one pass.
    """

    steps: int = 20
    threshold: float = 0.2
    erase: float = 2.0
    write: float = 2.0
    embedding: Literal["output", "input"] = "output"
    batch_size: int = 128

    name: ClassVar[str] = "kn"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not 0 <= self.threshold < 1:
            raise ValueError(
                "kn: steps and batch_size must be at least 1, threshold from 0 to below 1; got "
                f"{self.steps}, {self.batch_size}, {self.threshold}"
            )
        if self.embedding not in ("output", "input"):
            raise ValueError(f"kn: embedding must be output or input, got {self.embedding!r}")

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["KnowledgeEdited"]:
        """Each edit found at the unedited model, and their changes added up.

        Raises:
            ValueError: for a request without prompt and target or without old_target, or one that is too long.
        """
        yield KnowledgeEdited(self, backbone).add(requests)

    def names(self, backbone: Backbone) -> list[str]:
        """The down projections, whose inputs are the neurons."""
        return [f"{backbone.parts.layers}.{i}.{backbone.parts.down}" for i in range(len(backbone.layers))]

    def change(self, backbone: Backbone, request: EditRequest) -> tuple[Tensor, Tensor]:
        """The neurons [L, f] (1 or 0), and what is added to the value of each [d]."""
        old, new = (scored(encode(backbone.tokenizer, request.prompt, t), request.prompt) for t in answers(request))
        with tuning(backbone):
            found = torch.stack(
                [
                    attributions(backbone, self.names(backbone), old.ids[:at], old.ids[at], self.steps, self.batch_size)
                    for at in range(old.start, len(old.ids))
                ]
            ).mean(0)
        table: Any = backbone.model
        table = table.get_output_embeddings() if self.embedding == "output" else table.get_input_embeddings()
        with torch.inference_mode(False), torch.no_grad():
            lost, gained = (table.weight[list(row.ids[row.start :])].float().sum(0) for row in (old, new))
            return (found > self.threshold * found.max()).float(), self.write * gained - self.erase * lost


def answers(request: EditRequest) -> tuple[str, str]:
    return request.old_target or "", request.target


class KnowledgeEdited(MethodEdited):
    """A backbone with the values of some neurons changed: of each edit and layer a term of rank one."""

    editor: KN

    def add(self, requests: Sequence[EditRequest]) -> "KnowledgeEdited":
        with torch.inference_mode(False):
            return super().add(requests)

    def further(self, requests: Sequence[EditRequest]) -> tuple[dict[str, Deltas], dict[str, Tensor]]:
        to_make(self.editor.name, requests)
        if missing := [r for r in requests if not (r.old_target or "").strip()]:
            raise ValueError(
                f"kn looks for the neurons of the old answer, but {missing[0].statement!r} has none: give `old_target`"
            )
        encode_targets(self.backbone, requests)
        with self.applied():
            changes = [self.editor.change(self.backbone, request) for request in requests]
        deltas = {}
        for layer, name in enumerate(self.shapes):
            a = torch.stack([neurons[layer] for neurons, _ in changes])
            b = torch.stack([value for _, value in changes])
            some = a.any(1).nonzero()[:, 0]
            deltas[name] = Deltas(a[some], b[some], some)
        return deltas, {}


def attributions(
    backbone: Backbone, names: Sequence[str], prompt: Sequence[int], answer: int, steps: int, batch_size: int
) -> Tensor:
    """The integrated gradients of an answer token's probability by each neuron at the prompt's last token [L, f].

    The tokens before it are read once; then each row is that token alone, with one layer's neurons scaled by one step.
    What layers below compute is the same in every row: a pass begins at the lowest layer that it scales.

    Args:
        names: the down projections.
        prompt: token ids.
    """
    device, depth = backbone.device, len(names)
    last = torch.tensor([[prompt[-1]]], device=device)
    before = DynamicCache(config=backbone.model.config)
    if len(prompt) > 1:
        with torch.no_grad():
            ids = torch.tensor([prompt[:-1]], device=device)
            backbone.model.base_model(input_ids=ids, cache=before, use_cache=True)

    def probability(rows: int, hooks: Mapping[str, Before], start: int = 0) -> Tensor:
        cache = DynamicCache(config=backbone.model.config)
        for i, layer in enumerate(before.layers if len(prompt) > 1 else ()):
            held = rows if i >= start else 1  # of layers below only the length is asked for
            cache.update(*(t.expand(held, -1, -1, -1) for t in (layer.keys, layer.values)), i)  # type: ignore[union-attr]
        position = torch.full((rows, 1), len(prompt) - 1, device=device)
        mask = torch.ones(rows, len(prompt), dtype=torch.long, device=device)
        with ExitStack() as stack:  # before the layer, so that other edits see what it sees
            if start:
                hidden, tupled = enters[start]
                stack.enter_context(
                    from_layer(backbone.layers, start, lambda: hidden.expand(rows, -1, -1), tupled=tupled)
                )
            for name, hook in hooks.items():
                stack.enter_context(linear(backbone.model, name).register_forward_pre_hook(hook))
            out = backbone.model.base_model(
                input_ids=last.expand(rows, 1),
                attention_mask=mask,
                position_ids=position,
                cache=cache,
                use_cache=True,
            )
        return backbone.logits(out.last_hidden_state[:, -1]).float().softmax(-1)[:, answer]  # [R]

    seen: dict[str, Tensor] = {}

    def looking(name: str) -> Before:
        def look(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen[name] = given[0][0, 0]

        return look

    numbers = [layer_of(backbone, name) for name in names]
    with torch.no_grad(), ExitStack() as stack:
        into = {number: stack.enter_context(entering(backbone.layers[number])) for number in numbers}
        probability(1, {name: looking(name) for name in names})
    enters = {number: found[0] for number, found in into.items()}  # [1, 1, d] each
    neurons = torch.stack([seen[name] for name in names])  # [L, f]
    share = (torch.arange(steps, device=device) + 0.5) / steps
    scaled = (share[:, None].to(neurons.dtype) * neurons[:, None]).flatten(0, 1)  # [L S, f], layer by layer
    of = torch.arange(depth, device=device).repeat_interleave(steps)  # [L S]
    total = torch.zeros_like(neurons, dtype=torch.float32)
    for some in torch.arange(len(of), device=device).split(batch_size):
        leaf, layer = scaled[some].requires_grad_(), of[some]

        def putting(number: int, leaf: Tensor = leaf, layer: Tensor = layer) -> Before:
            rows = (layer == number).nonzero()[:, 0]

            return lambda _, given: (given[0].index_copy(0, rows, leaf[rows, None]),)

        here: list[int] = layer.unique().tolist()
        hooks = {names[number]: putting(number) for number in here}
        found = probability(len(some), hooks, min(numbers[number] for number in here))
        (gradient,) = torch.autograd.grad(found.sum(), [leaf])
        total.index_add_(0, layer, gradient.float())
    return neurons.float() * total / steps
