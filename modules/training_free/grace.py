"""GRACE: a codebook beside one layer, which answers in its place where a query is near to an edit's (arXiv 2211.11031).

A query is the layer's input at the prompt's last token. Where it lies within epsilon of a key, the layer's output is
replaced by the key's value; elsewhere the model is what it was, bit for bit.

N edits, K keys, B rows, T tokens.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from datamodules.records import EditRequest
from datamodules.tokens import Encoded
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.hypernetwork.batch import Scored, padded
from modules.interventions import Hook, hooked, shape
from modules.training_free.codebook import Codebook, rounded
from modules.training_free.locate import layer_numbers
from modules.training_free.prepared import Prepared, Prompt, prepare_rows
from modules.training_free.shared import (
    Layer,
    encode_targets,
    kept,
    load_state,
    save_state,
    to_make,
    tuning,
)
from modules.training_free.subject import Enough, Row

Replace = Literal["last", "prompt"]


@dataclass
class GRACE(Editor):
    """The codebook, with values tuned by Adam on the target's tokens.

    Keys do not depend on values, since a layer's input comes before its output. So all edits of a call are placed
    first, and their values are then tuned side by side. Of an edit that an older key took in, a newer key may be the
    nearest, as published.

    Args:
        layer: a number, from the end where negative, or a fraction of the depth.
        linear: which of the MLP's linear layers: `first` (GPT2-XL as published) or `last`.
        epsilon: of a new key, in the units of the layer's input.
        steps, lr: of Adam, for each value.
        stop_at: an edit whose loss is below this takes no further step; 0: none ever stops, as released.
        replace: the output at the prompt's last token (EasyEdit), or at all of the prompt's (as released).
        tune_expanded: an edit that an older key takes in tunes that key's value further, as the released code does; the
            paper only grows the ball.
        batch_size: edits of one pass.
        seed: of the values' start, uniform on [0, 1).
    """

    layer: Layer = 0.7
    linear: Literal["first", "last"] = "last"
    epsilon: float = 1.0
    steps: int = 100
    lr: float = 1.0
    stop_at: float = 1e-2
    replace: Replace = "last"
    tune_expanded: bool = False
    batch_size: int = 32
    seed: int = 0

    name: ClassVar[str] = "grace"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or not self.lr > 0 or not self.epsilon > 0 or self.stop_at < 0:
            raise ValueError(
                "grace: steps and batch_size must be at least 1, lr and epsilon positive and stop_at not negative; got "
                f"{self.steps}, {self.batch_size}, {self.lr}, {self.epsilon}, {self.stop_at}"
            )
        if self.linear not in ("first", "last") or self.replace not in ("last", "prompt"):
            raise ValueError(
                f"grace: linear must be first or last, replace last or prompt; got {self.linear!r}, {self.replace!r}"
            )

    def place(self, backbone: Backbone) -> str:
        """The layer's name.

        Raises:
            ValueError: where the model has no such layer.
        """
        (number,) = layer_numbers(backbone, [self.layer])
        return f"{backbone.parts.layers}.{number}.{backbone.parts.mlp[0 if self.linear == 'first' else -1]}"

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["GraceEdited"]:
        """All requests, in their order, which matters.

        Raises:
            ValueError: for free text, an edit that is too long, or a layer that the model does not have.
            FloatingPointError: where a loss is no number.
        """
        yield GraceEdited(self, backbone).add(requests)

    def queries(self, backbone: Backbone, rows: Sequence[Scored]) -> Tensor:
        """The layer's inputs at the prompts' last tokens [N, d_in], in float32 or better, by a pass that ends there.

        Prompts are read with their targets, as they are when they are scored: in half precision other shapes round
        otherwise, and a prompt would be beyond the ball of its own key.
        """
        found: list[Tensor] = []

        def look(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            found.append(given[0])
            raise Enough

        ids, mask, _ = (t.to(backbone.device) for t in padded(backbone.tokenizer, rows))
        with torch.no_grad(), hooked(backbone.model, {self.place(backbone): look}), suppress(Enough):
            backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        x = found[0][range(len(rows)), [row.start - 1 for row in rows]]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def begin(self, row: Scored) -> int:
        """The first token that a value is put at."""
        return row.start - 1 if self.replace == "last" else 0

    def tune(self, backbone: Backbone, rows: Sequence[Scored], values: Tensor) -> Tensor:
        """Values [N, d_out] under which each row's target is likely, from these. Where only the prompt's last token is
        replaced, what stands before it is read once."""
        (number,) = layer_numbers(backbone, [self.layer])
        begin = [self.begin(row) for row in rows]
        prompts = [Prompt(Row(r.ids, b, r.start), e, 1.0) for e, (r, b) in enumerate(zip(rows, begin, strict=True))]
        left: Prepared | None = prepare_rows(backbone, prompts, number)
        last = torch.tensor([r.start - 1 - b for r, b in zip(rows, begin, strict=True)], device=backbone.device)
        values = values.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([values], lr=self.lr)
        for _ in range(self.steps):
            own = left.mask[:, -left.ids.shape[1] :]
            at = replaced(last[left.edit], own, self.replace)
            with hooked(backbone.model, {self.place(backbone): replacing(values[left.edit], at)}):
                losses = left.losses(backbone, lambda hidden: hidden, len(rows))  # [N]
            if not bool(losses.isfinite().all()):
                raise FloatingPointError(f"grace: the loss is no number any more; lower lr ({self.lr})")
            active = torch.zeros(len(rows), dtype=torch.bool, device=losses.device)
            active[left.edit] = losses[left.edit] >= self.stop_at
            (values.grad,) = torch.autograd.grad(losses.sum(), [values])
            before = values.detach()[~active]
            optimizer.step()
            with torch.no_grad():
                values[~active] = before  # Adam moves on without a gradient too
            left = left.keep(active)
            if left is None:
                break
        return values.detach()


def replaced(last: Tensor, mask: Tensor, where: Replace) -> Tensor:
    """The tokens whose output is replaced [B, T]: `last` [B], or also those before it that are not padding."""
    token = torch.arange(mask.shape[1], device=mask.device)[None]
    if where == "last":
        return token == last[:, None]
    return (token <= last[:, None]) & mask.bool()


def replacing(values: Tensor, at: Tensor) -> Hook:
    """Put values [B, d_out] in the place of a layer's output at these tokens [B, T]."""
    return lambda _, inputs, output: torch.where(at[..., None], values[:, None].to(output.dtype), output)


class GraceEdited(Edited):
    """A backbone with a codebook at one layer, which is there in its own passes alone.

    Args:
        requests: edit i is answered by key `codebook.key_of[i]`.
    """

    reads_prompts = True  # its codebook is asked at the prompt's last token

    def __init__(
        self,
        editor: GRACE,
        backbone: Backbone,
        requests: Sequence[EditRequest] = (),
        codebook: Codebook | None = None,
    ) -> None:
        super().__init__(backbone)
        self.editor = editor
        self.name = editor.place(backbone)
        self.requests = tuple(requests)
        if codebook is None:
            d_in, d_out = shape(backbone.model, self.name)
            with torch.inference_mode(False):
                none = torch.zeros(0, d_in + d_out, device=backbone.device)
            codebook = Codebook(none[:, :d_in], none[:, d_in:], none[:, 0])
        self.codebook = codebook
        self._last: Tensor | None = None  # [B], while targets are scored

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        """The prompt ends where the first pass does, unless targets are being scored; later passes continue it."""
        if state is not None or not len(self.codebook.keys):
            return super().decode(ids, mask, state, **options)[0], "continued"
        own = mask[:, -ids.shape[1] :]  # without cached tokens
        last = self._last
        if last is None:
            last = own.shape[1] - 1 - own.flip(1).argmax(1)
        at = replaced(last, own, self.editor.replace)

        def answer(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
            query = given[0][torch.arange(len(last), device=last.device), last.clamp(min=0)]
            key, distance = self.codebook.nearest(query)
            near = distance <= self.codebook.epsilons[key]
            return replacing(self.codebook.values[key], at & near[:, None])(_, given, output)  # type: ignore[return-value]

        with hooked(self.backbone.model, {self.name: answer}):
            return super().decode(ids, mask, state, **options)[0], "continued"

    def _score(self, rows: Sequence[Encoded], *options: Any) -> Any:
        self._last = torch.tensor([row.target_start - 1 for row in rows], device=self.backbone.device)
        try:
            return super()._score(rows, *options)
        finally:
            self._last = None

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["GraceEdited"]:
        """The same with more edits; one that is there already is not repeated."""
        yield self.add(requests)

    def add(self, requests: Sequence[EditRequest]) -> "GraceEdited":
        """See `edit`."""
        editor, backbone = self.editor, self.backbone
        new = to_make(editor.name, requests, self.requests)
        rows = encode_targets(backbone, new)
        book = self.codebook
        tuned: dict[int, list[Scored]] = {}  # key -> the rows that its value is tuned on, one after another
        same = rounded(backbone)
        with tuning(backbone):
            for at in range(0, len(rows), editor.batch_size):
                batch = rows[at : at + editor.batch_size]
                for row, query in zip(batch, editor.queries(backbone, batch), strict=True):
                    book, fresh = book.place(query, row.ids[row.start :], editor.epsilon, same)
                    if fresh or editor.tune_expanded:
                        tuned.setdefault(book.key_of[-1], []).append(row)
            values = book.values.clone()
            for key in range(len(self.codebook.keys), len(values)):
                draw = torch.Generator().manual_seed(editor.seed + key)  # the same one by one as all at once
                values[key] = torch.rand(values.shape[1], generator=draw).to(values)
            for turn in range(max(map(len, tuned.values()), default=0)):
                of = {key: rows[turn] for key, rows in tuned.items() if turn < len(rows)}
                # by the tokens of a step, then by those before: little padding
                keys = sorted(of, key=lambda key: (len(of[key].ids) - editor.begin(of[key]), editor.begin(of[key])))
                for at in range(0, len(keys), editor.batch_size):
                    some = keys[at : at + editor.batch_size]
                    values[some] = editor.tune(backbone, [of[key] for key in some], values[some])
        return GraceEdited(editor, backbone, [*self.requests, *new], replace(book, values=values))

    def remove(self, requests: Sequence[EditRequest]) -> "GraceEdited":
        """The same without these edits. A key that other edits share stays for them; balls stay as they have become.

        Raises:
            ValueError: for an edit that was not made.
        """
        rows = kept(self.requests, requests)
        return GraceEdited(self.editor, self.backbone, [self.requests[i] for i in rows], self.codebook.keep(rows))

    def save(self, folder: Path) -> None:
        """Write edits.safetensors and edits.json to a folder."""
        book = self.codebook
        tensors = {"keys": book.keys, "values": book.values, "epsilons": book.epsilons}
        tensors["key_of"] = torch.tensor(book.key_of, dtype=torch.long)
        save_state(folder, type(self.editor).name, self.requests, tensors)

    def restored(self, folder: Path) -> "GraceEdited":
        """The same method and backbone with the edits that `save` wrote to a folder.

        Raises:
            ValueError: where the folder holds none, or those of another method or model.
        """
        requests, t = load_state(folder, type(self.editor).name, self.backbone.device)
        sizes = t["keys"].shape[1], t["values"].shape[1]
        if sizes != shape(self.backbone.model, self.name):
            raise ValueError(f"the edits in {folder} are of a layer of another size; make them again")
        of = t["key_of"].tolist()
        rows = encode_targets(self.backbone, requests)
        labels = tuple(rows[of.index(key)].ids[rows[of.index(key)].start :] for key in range(len(t["keys"])))
        book = Codebook(t["keys"], t["values"], t["epsilons"], labels, tuple(of))
        return GraceEdited(self.editor, self.backbone, requests, book)
