"""Texts ready to be read again and again with something added from one token and one layer on: the values of ROME and
MEMIT at the subject's last token, those of GRACE at the prompt's, the change of FT at all tokens.

What stands before that token, and what the layers below compute, never changes: they run once, and every further pass
takes their keys, values and states from there and runs the layers above over the tokens that are left alone.

R rows, S tokens from that one on (`Row.subject`), P tokens before it, d hidden width, E edits, n predicted tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.tokens import pad, pad_id
from modules.backbone import Backbone
from modules.from_layer import from_layer
from modules.losses import Head, head_of, mean_per_row, token_cross_entropy, token_kl
from modules.training_free.subject import Row

PASS, PASS_ON_CPU = 1024, 32  # tokens that take as long as a pass of none: reading the weights, starting the kernels
Adding = Callable[[Tensor], Tensor]  # hidden states or a module's output [R, S, d], with something added


@dataclass(frozen=True)
class Prompt:
    """A text of an edit, and what of it counts in the edit's loss.

    Args:
        edit: number of the edit.
        weight: of the loss in that of the edit.
        kind: `target`: the mean cross-entropy of the target's tokens; `drift`: KL(edited || unedited) of what follows
            the text's last token.
    """

    row: Row
    edit: int
    weight: float
    drift: bool = False


@dataclass(frozen=True)
class Prepared:
    """Rows of one pass, with what never changes of them.

    Args:
        ids: from the first token that may change on [R, S], right-padded; mask [R, P + S]; positions [R, S].
        hidden: what comes into layer `start` at these tokens [R, S, d].
        cached: keys and values [R, h, P, dh] of the tokens before, by layer; of layers below, of one row.
        edit, weight: [R].
        row, at, label: the predicted tokens [n]: their row, the position that predicts them, and their id.
        drift, last: rows whose drift counts, and their last position; before: [drift rows, d] last hidden state of the
            unedited model there.
        tupled: layers return tuples.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    hidden: Tensor
    cached: list[tuple[Tensor, Tensor]]
    edit: Tensor
    weight: Tensor
    row: Tensor
    at: Tensor
    label: Tensor
    drift: Tensor
    last: Tensor
    before: Tensor
    start: int
    tupled: bool

    def losses(self, backbone: Backbone, adding: Adding, count: int) -> Tensor:
        """Weighted losses of the rows, added up by edit [E], of a model with something added to what comes into layer
        `start`; what else is added, in that layer or above, is on the model already."""
        head = head_of(backbone.model)
        cache = DynamicCache(config=backbone.model.config)
        for i, (keys, values) in enumerate(self.cached):  # i is the layer
            cache.update(keys, values, i)  # of layers below only the length is asked for
        with from_layer(backbone.layers, self.start, lambda: adding(self.hidden), self.tupled):
            out = backbone.model.base_model(
                input_ids=self.ids,
                attention_mask=self.mask,
                position_ids=self.positions,
                cache=cache,
                use_cache=True,
            )
        hidden = out.last_hidden_state  # [R, S, d]
        value = _target_losses(hidden, head, self)
        if len(self.drift):
            kl = token_kl(hidden[self.drift, self.last], head, self.before, head, direction="reverse")
            value = value.index_add(0, self.drift, kl)
        return value.new_zeros(count).index_add(0, self.edit, value * self.weight)

    def keep(self, edits: Tensor) -> "Prepared | None":
        """Only the rows of edits [E] that are true; None where there is none."""
        kept = edits[self.edit]
        if bool(kept.all()):
            return self
        if not bool(kept.any()):
            return None
        number = kept.cumsum(0) - 1
        tokens, drifts = kept[self.row], kept[self.drift]
        return replace(
            self,
            ids=self.ids[kept],
            mask=self.mask[kept],
            positions=self.positions[kept],
            hidden=self.hidden[kept],
            cached=[(k, v) if i < self.start else (k[kept], v[kept]) for i, (k, v) in enumerate(self.cached)],
            edit=self.edit[kept],
            weight=self.weight[kept],
            row=number[self.row[tokens]],
            at=self.at[tokens],
            label=self.label[tokens],
            drift=number[self.drift[drifts]],
            last=self.last[drifts],
            before=self.before[drifts],
        )


def prepare(backbone: Backbone, prompts: Sequence[Prompt], start: int, chunk: int) -> list[Prepared]:
    """Run prompts once, under whatever edits are on now.

    Args:
        start: the layer that something is added before, or in.
        chunk: rows of one pass.
    """
    order = sorted(prompts, key=lambda p: (len(p.row.ids) - p.row.subject, p.row.subject))  # little padding
    worth = PASS_ON_CPU if backbone.device.type == "cpu" else PASS
    return [prepare_rows(backbone, part, start) for part in _passes(order, chunk, worth)]


def _passes(prompts: Sequence[Prompt], chunk: int, worth: int) -> Iterator[Sequence[Prompt]]:
    """Prompts, the shortest first, in passes of at most `chunk`; one more where it spares more padding than a pass is
    `worth`, in tokens."""
    lengths = [len(p.row.ids) - p.row.subject for p in prompts]
    start = 0
    for i in range(1, len(prompts)):
        if i - start == chunk or (i - start) * (lengths[i] - lengths[i - 1]) > worth:
            yield prompts[start:i]
            start = i
    if prompts:
        yield prompts[start:]


@torch.no_grad()
def prepare_rows(backbone: Backbone, prompts: Sequence[Prompt], start: int) -> Prepared:
    """Run prompts once, under whatever edits are on now, as rows of one pass in the order given."""
    fill, device = pad_id(backbone.tokenizer), backbone.device
    rows = [p.row for p in prompts]
    # nothing is predicted after the target's last token
    texts = [r.ids[: max(len(r.ids) - (r.target < len(r.ids)), r.subject + 1)] for r in rows]
    tails, tail_mask = pad([t[r.subject :] for t, r in zip(texts, rows, strict=True)], fill)
    if any(r.subject for r in rows):
        heads, head_mask = pad([t[: r.subject] for t, r in zip(texts, rows, strict=True)], fill, side="left")
    else:
        heads, head_mask = tails[:, :0], tail_mask[:, :0]
    ids, mask = (torch.cat(t, dim=1).to(device) for t in ((heads, tails), (head_mask, tail_mask)))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    before = heads.shape[1]
    seen: list[Any] = []
    handle = backbone.layers[start].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    returned: list[bool] = []
    other = backbone.layers[start].register_forward_hook(lambda _, __, out: returned.append(isinstance(out, tuple)))
    try:
        cache = DynamicCache(config=backbone.model.config)
        out = backbone.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
    finally:
        handle.remove()
        other.remove()
    picked = [
        (i, j - 1 - r.subject, r.ids[j])
        for i, r in enumerate(rows)
        if not prompts[i].drift
        for j in range(max(r.target, r.subject + 1), len(r.ids))
    ]
    row, at, label = (torch.tensor(column, dtype=torch.long, device=device) for column in _columns(picked))
    drift = torch.tensor([i for i, p in enumerate(prompts) if p.drift], dtype=torch.long, device=device)
    last = (tail_mask.sum(1) - 1).to(device)[drift]
    held = [slice(None, 1) if i < start else slice(None) for i in range(len(cache.layers))]
    cached = [
        (layer.keys[rows, ..., :before, :].clone(), layer.values[rows, ..., :before, :].clone())  # type: ignore[index]
        for rows, layer in zip(held, cache.layers, strict=True)
    ]
    return Prepared(
        ids=ids[:, before:],
        mask=mask,
        positions=positions[:, before:],
        hidden=seen[0][:, before:].clone(),
        cached=cached,
        edit=torch.tensor([p.edit for p in prompts], device=device),
        weight=torch.tensor([p.weight for p in prompts], device=device),
        row=row,
        at=at,
        label=label,
        drift=drift,
        last=last,
        before=out.last_hidden_state[:, before:][drift, last],
        start=start,
        tupled=returned[0],
    )


def _columns(picked: Sequence[tuple[int, int, int]]) -> tuple[list[int], list[int], list[int]]:
    return [p[0] for p in picked], [p[1] for p in picked], [p[2] for p in picked]


def _target_losses(hidden: Tensor, head: Head, rows: Prepared) -> Tensor:
    loss = token_cross_entropy(hidden[rows.row, rows.at], head, rows.label)
    return mean_per_row(loss, rows.row, len(hidden))  # [R]
