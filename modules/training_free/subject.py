"""Where a method that locates facts reads and writes: the last token of the subject.

R rows, T tokens, w width of a layer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from datamodules.records import EditRequest
from datamodules.tokens import encode_subject, pad, pad_id
from modules.backbone import Backbone
from modules.training_free.held import Held


@dataclass(frozen=True)
class Row:
    """A text that names a subject.

    Args:
        ids: its tokens.
        subject: index of the subject's last token.
        target: index of the target's first token; the length of `ids` where there is no target.
    """

    ids: tuple[int, ...]
    subject: int
    target: int


def require_subjects(method: str, requests: Sequence[EditRequest]) -> None:
    """Refuse what has no prompt, target or subject.

    Raises:
        ValueError: names the method and the request.
    """
    for request in requests:
        if not (request.prompt and request.target):
            raise ValueError(f"{method} edits a prompt with a target; this edit is free text: {request.statement!r}")
        if not request.subject or request.subject not in request.prompt:
            raise ValueError(
                f"{method} needs the subject of every edit, as a part of its prompt; the edit {request.statement!r} "
                f"has the subject {request.subject!r}. Use data that names subjects, or an editor that needs none, or "
                'add "subject": "..." to the edit'
            )


def row(backbone: Backbone, prompt: str, subject: str, target: str = "", prefix: str = "") -> Row:
    """`prefix prompt target` as tokens.

    Raises:
        ValueError: where the prompt lacks the subject, or all is longer than the context window.
    """
    encoded, at = encode_subject(backbone.tokenizer, prompt, subject, target, prefix)
    room = getattr(backbone.model.config, "max_position_embeddings", None)
    if room and len(encoded.ids) > room:
        raise ValueError(f"{len(encoded.ids)} tokens do not fit the context window of {room}: {prompt!r}")
    return Row(encoded.ids, at, encoded.target_start)


class Enough(Exception):
    """All that was wanted of a forward pass is there: the layers above need not run."""


@torch.no_grad()
def subject_states(
    backbone: Backbone,
    rows: Sequence[Row],
    inputs: Sequence[str],
    outputs: Sequence[str],
    chunk: int = 128,
    held: Held | None = None,
) -> dict[str, Tensor]:
    """What goes into and comes out of modules at the subjects' last tokens, under whatever edits are on now.

    Args:
        inputs, outputs: names of modules whose first input, or output, is wanted.
        chunk: rows of one forward pass; it ends at the last module that is wanted.
        held: of earlier calls with these rows, where this one's passes begin.

    Returns:
        [R, w] by name, in float32 or better; a module wanted for both gives its output under `name + ".out"`.
    """
    wanted = {(name, False) for name in inputs} | {(name, True) for name in outputs}
    found: dict[str, Tensor] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for at in range(0, len(order), chunk):
        batch = order[at : at + chunk]
        # The whole prompt, though what comes after the subject is not seen by it: the gates of COMEBA-HK's hook layers
        # judge each token among all of its text.
        ids, mask = pad([rows[i].ids[: rows[i].target] for i in batch], pad_id(backbone.tokenizer))
        place = torch.tensor([rows[i].subject for i in batch])
        got: dict[str, Tensor] = {}
        passing = held.reading(backbone, at) if held else nullcontext()
        with passing, _watching(backbone.model, wanted, got, place.to(backbone.device)):
            backbone.model.base_model(
                input_ids=ids.to(backbone.device), attention_mask=mask.to(backbone.device), use_cache=False
            )
        for name, value in got.items():
            if name not in found:
                found[name] = value.new_empty(len(rows), value.shape[1])
            found[name][torch.tensor(batch, device=value.device)] = value
    return found


@contextmanager
def _watching(model: nn.Module, wanted: set[tuple[str, bool]], got: dict[str, Tensor], place: Tensor) -> Iterator[None]:
    both = {name for name, out in wanted if out} & {name for name, out in wanted if not out}

    def watch(name: str, out: bool) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            value = (result[0] if isinstance(result, tuple) else result) if out else args[0]
            picked = value[torch.arange(len(place), device=value.device), place.to(value.device)]
            got[f"{name}.out" if out and name in both else name] = picked.to(
                torch.promote_types(picked.dtype, torch.float32)
            )
            if len(got) == len(wanted):
                raise Enough

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name, out)) for name, out in wanted]
    try:
        yield
    except Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
