"""Value vectors: what a layer must add at the subject's last token for the model to say the target (v* of ROME, z* of
MEMIT), for many edits at once.

Each edit has a change of its own, added at the subject's last token of all its prompts, its own Adam and its own stop;
its loss is of its own rows alone, so that many edits in one batch find what each finds by itself.

    loss = mean over contexts of the target's mean NLL + kl_factor * KL(edited || unedited) of what follows
           "{subject} is a" (or the subject, `kl_at`) + weight_decay * ||delta|| / ||v0||^p
    after every step ||delta|| <= clamp * ||v0||

Sources: ROME (arXiv 2202.05262, eq. 4) and MEMIT (arXiv 2210.07229, eq. 16) with the losses of their released code;
EAC: Xu et al. 2025, section 5. The head reads the last layer, as in all released settings.

E edits, p places, d hidden width.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm.auto import tqdm

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.evaluating import evaluating
from modules.training_free.kept_values import KeptValues, Values, joined, key_of
from modules.training_free.places import add, added, initial_outputs
from modules.training_free.prepared import Prepared, Prompt, prepare
from modules.training_free.subject import row
from modules.training_free.value_options import EAC, Place, ValueOptions


@dataclass
class _Elastic:
    """What stage 2 of EAC adds: coordinates that are kept [E, p, d], the weights of the L1 norm, and its strengths."""

    keep: Tensor
    weight: Tensor
    l1: float
    l2: float | None


@dataclass
class _Search:
    """The loss of every edit as a function of its change."""

    backbone: Backbone
    rows: list[Prepared]
    initial: Tensor
    place: Place
    layer: int
    options: ValueOptions
    norm: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.norm = self.initial.norm(dim=-1)  # [E, p]

    def gradient(
        self, delta: Tensor, active: Tensor, elastic: _Elastic | None, until: float = -math.inf
    ) -> tuple[Tensor, Tensor]:
        """Losses [E] and their gradients [E, p, d]; those of edits that are not active are 0.

        Args:
            until: where all active edits have a loss below this, no gradient is wanted: the last backward pass is
                spared (all of them where it is infinite), and what is returned of gradients means nothing.
        """
        delta = delta.detach().requires_grad_()
        penalty = torch.where(active, self._penalty(delta, elastic), 0)
        total, gradient = penalty.detach(), torch.autograd.grad(penalty.sum(), delta)[0]
        for i, rows in enumerate(self.rows):
            with added(self.backbone, self.place, self.layer, delta, rows.edit):
                adding = (lambda x, e=rows.edit: add(x, delta[:, 0][e])) if self._before else (lambda x: x)
                losses = rows.losses(self.backbone, adding, len(delta))
            total = total + losses.detach()
            if until < math.inf and (i + 1 < len(self.rows) or bool((active & (total >= until)).any())):
                gradient = gradient + torch.autograd.grad(losses.sum(), delta)[0]
        return total, gradient

    @property
    def _before(self) -> bool:
        """Whether the change is added to what comes into the first layer that runs, not to outputs inside of it."""
        return self.place != "attention and mlp" and self.layer + 1 < len(self.backbone.layers)

    def _penalty(self, delta: Tensor, elastic: _Elastic | None) -> Tensor:
        size = (delta.square().sum(-1) + torch.finfo(delta.dtype).tiny).sqrt()  # a gradient at 0, too
        power = 2 if self.options.decay == "released" else 1
        decay = self.options.weight_decay * (size / self.norm**power).sum(-1)
        if elastic is None:
            return decay
        if elastic.l2 is not None:
            decay = elastic.l2 * delta.square().sum((-1, -2))
        return decay + elastic.l1 * (elastic.weight * delta.abs() * elastic.keep).sum((-1, -2))

    def drop(self, active: Tensor) -> None:
        """Take the rows of edits that are done out of the batch."""
        self.rows = [kept for rows in self.rows if (kept := rows.keep(active)) is not None]


def find_values(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    layer: int,
    place: Place,
    options: ValueOptions,
    edits: str | None = None,
) -> Values:
    """Optimise the value vectors of edits, of the model as it is edited now, `options.group` of them at a time.

    Args:
        prefixes: text before the prompt; the first is "".
        layer: the decoder layer.
        place: what the change is added to, and what v0 is: the output of the layer's MLP (ROME), of the layer (MEMIT),
            or of its attention and of its MLP (PMET), which makes p = 2.
        edits: a hash of the edits in force, "" for none, under which values are kept on disk; None: they are not. See
            `ValueOptions.keep`.

    Raises:
        ValueError: where a prompt lacks its subject or does not fit the context window, for a file of kept values that
            cannot be read, and for weights that are not whole on this process where values are kept (ZeRO-3).
        FloatingPointError: where a loss is no number; it names the edit.
    """
    with torch.inference_mode(False):
        kept = None
        if options.keep and edits is not None:
            kept = KeptValues.of(backbone, prefixes, layer, place, options, edits)
        found = kept.read(backbone.device) if kept else {}
        left = list({key: r for r in requests if (key := key_of(r)) not in found}.values())
        with tqdm(total=len(left), desc="values", leave=False, disable=len(left) <= options.group) as bar:
            for at in range(0, len(left), options.group):
                group = left[at : at + options.group]
                values = _search(backbone, group, prefixes, layer, place, options)
                found |= {key_of(r): values.of(e) for e, r in enumerate(group)}
                if kept:
                    kept.write(group, values)
                bar.update(len(group))
        return joined([found[key_of(r)] for r in requests])


def _search(
    backbone: Backbone,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    layer: int,
    place: Place,
    options: ValueOptions,
) -> Values:
    prompts = [
        Prompt(row(backbone, r.prompt, str(r.subject), r.target, prefix), e, 1 / len(prefixes))
        for e, r in enumerate(requests)
        for prefix in prefixes
    ]
    if options.kl_factor:
        rest = " is a" if options.kl_at == "phrase" else ""
        prompts += [
            Prompt(row(backbone, f"{r.subject}{rest}", str(r.subject)), e, options.kl_factor, drift=True)
            for e, r in enumerate(requests)
        ]
    bare = [row(backbone, r.prompt, str(r.subject)) for r in requests]
    with torch.enable_grad(), evaluating(backbone.model):
        initial = initial_outputs(backbone, bare, layer, place)  # [E, p, d]
        inside = place == "attention and mlp" or layer + 1 == len(backbone.layers)
        start = layer if inside else layer + 1
        search = _Search(backbone, prepare(backbone, prompts, start, options.chunk), initial, place, layer, options)
        zero = torch.zeros_like(initial)
        if options.eac is None:
            return _descend(search, zero, options.steps, None, requests)[0]
        return _compress(search, zero, options.eac, requests)


def _descend(
    search: _Search,
    delta: Tensor,
    steps: int,
    elastic: _Elastic | None,
    requests: Sequence[EditRequest],
    scored: bool = False,
) -> tuple[Values, Tensor]:
    """Adam from `delta` on; where they are `scored`, also the mean gradient of each edit's steps [E, p, d]."""
    options, rows = search.options, search.rows
    mean, square, summed = (torch.zeros_like(delta) for _ in range(3))
    active = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
    last = delta.new_zeros(len(delta))
    updates = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
    seen = updates.clone()
    for step in range(1, steps + 1):
        until = -math.inf if scored else math.inf if step == steps else options.stop
        loss, gradient = search.gradient(delta, active, elastic, until)
        if not bool(loss[active].isfinite().all()):
            wrong = int((active & ~loss.isfinite()).nonzero()[0])
            raise FloatingPointError(f"the loss of a value vector is no number: {requests[wrong].statement!r}")
        last = torch.where(active, loss, last)
        summed, seen = summed + gradient, seen + active
        going = active & (loss >= options.stop)
        if not bool(going.any()) or step == steps:
            break
        if bool((going != active).any()):
            search.drop(going)
        active = going
        if elastic is not None:
            gradient = gradient * elastic.keep
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient.square()
        moved = delta - options.lr * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
        limit = options.clamp * search.norm[..., None]
        moved = moved * (limit / moved.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        delta = torch.where(active[:, None, None], moved, delta)
        updates = updates + active
    search.rows = rows  # a second stage begins with all of them
    return Values(delta, search.initial, last, updates), summed / seen.clamp(min=1)[:, None, None]


def _compress(search: _Search, zero: Tensor, eac: EAC, requests: Sequence[EditRequest]) -> Values:
    """The two stages of EAC. An edit that needs no update has no scores, and needs none in stage 2 either."""
    first, gradient = _descend(search, zero, eac.first_steps, None, requests, scored=True)
    score = (gradient * first.delta).abs()
    count = max(1, round(eac.keep * score.shape[-1]))
    keep = torch.zeros_like(score).scatter(-1, score.topk(count).indices, 1.0)
    start = first.delta * keep if eac.warm_start else zero
    elastic = _Elastic(keep, 1 / (score + eac.epsilon), eac.l1, eac.l2)
    return _descend(search, start, eac.steps, elastic, requests)[0]
