"""What the tokens of validation queries select among the edits of a pool, as figures and scalars."""

from collections.abc import Sequence

import lightning as L
import torch

from datamodules.records import EditRecord, Query
from datamodules.tokens import encode, pad, pad_id
from modules.evaluation import without_collisions
from modules.gist.editor import GistEdited, GistEditor
from trainers.callbacks.common import trained_editor, untouched, validation_records, writers
from trainers.callbacks.figures import Profile, Selection, heat_map, layer_profile, profile, token_trace


class SelectionFigures(L.Callback):
    """For editors with gists: makes the first validation records one pool, asks of each a rephrase (in scope) and a
    locality query (out of scope), and logs what their tokens select:

    - selection/heat_map_<i>: tokens x edits, a panel per layer;
    - selection/layer_profile: zero-gist, golden gist and entropy by layer, where the answer is predicted;
    - selection/token_trace: the same along the tokens of one query that is answered rightly and one that is not;
    - selection/zero_gist_in_scope, zero_gist_out_of_scope, golden, entropy (in scope): means over layers.

    All ranks ask the same, since sharded weights (ZeRO-3) want every rank in every forward pass; rank 0 draws.

    Args:
        records: edits in the pool.
        examples: heat maps to draw.
        every_n_validations: look at the first validation and every n-th after it.
    """

    def __init__(self, records: int = 24, examples: int = 4, every_n_validations: int = 1) -> None:
        if records < 1 or every_n_validations < 1:
            raise ValueError(f"records and every_n_validations must be at least 1: {records}, {every_n_validations}")
        self.records, self.examples, self.every_n_validations = records, examples, every_n_validations
        self._validations = 0

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        self._validations += 1
        if (self._validations - 1) % self.every_n_validations:
            return
        editor = trained_editor(pl_module).editor()
        if not isinstance(editor, GistEditor):
            raise TypeError(f"the editor {editor.name!r} has no gists to select among; take SelectionFigures out")
        records = validation_records(trainer, self.records)
        with untouched(pl_module), editor.edit(editor.model.backbone, [r.request for r in records]) as edited:
            inside, outside = in_and_out_of_scope(edited, records)
        if inside:
            self._log(trainer, pl_module, edited, inside, outside)

    def _log(
        self,
        trainer: L.Trainer,
        module: L.LightningModule,
        edited: GistEdited,
        inside: Sequence[Selection],
        outside: Sequence[Selection],
    ) -> None:
        profiles = profile(inside), profile(outside) if outside else None
        module.log_dict(scalars(*profiles), sync_dist=trainer.world_size > 1)
        layers = list(edited.model.active)
        shared = len(inside[0].probabilities) < len(layers)
        panels = [f"all active layers ({layers[0]}-{layers[-1]})"] if shared else [f"layer {i}" for i in layers]
        names = [request.subject or request.statement for request in edited.requests]
        figures = {f"heat_map_{i}": heat_map(s, names, panels) for i, s in enumerate(inside[: self.examples])}
        figures["layer_profile"] = layer_profile(layers, *profiles)
        figures["token_trace"] = token_trace(right_and_wrong(inside))
        for file in writers(trainer):
            for name, figure in figures.items():
                file.add_figure(f"selection/{name}", figure, trainer.global_step)


def in_and_out_of_scope(edited: GistEdited, records: Sequence[EditRecord]) -> tuple[list[Selection], list[Selection]]:
    """What the tokens of one rephrase (or the edit's own prompt) and of one locality query of each record select.

    Locality queries that name the subject of another edit of the pool are passed over.
    """
    place = {request.statement: i for i, request in enumerate(edited.requests)}
    inside = [(query, place[r.request.statement]) for r in records if (query := _rephrase(r))]
    kept, _ = without_collisions(records)
    outside = [next(iter(queries)) for r in kept if (queries := [q for qs in r.locality.values() for q in qs])]
    found = ask(edited, [q for q, _ in inside] + outside, [i for _, i in inside] + [None] * len(outside))
    return found[: len(inside)], found[len(inside) :]


@torch.no_grad()
def ask(edited: GistEdited, queries: Sequence[Query], golden: Sequence[int | None]) -> list[Selection]:
    """Read each query with its answer in one forward pass, and keep what its tokens select.

    Args:
        golden: place in the pool of the edit that each query should read; None: none.
    """
    backbone, tokenizer = edited.backbone, edited.backbone.tokenizer
    rows = [encode(tokenizer, q.prompt, q.target, bos=edited.bos) for q in queries]
    ids, mask = (t.to(backbone.device) for t in pad([r.ids for r in rows], pad_id(tokenizer)))
    trace: dict[int, torch.Tensor] = {}
    states = edited.decode(ids, mask, trace=trace)[0].last_hidden_state  # [B, T, d]
    choices = list({id(t): t for t in trace.values()}.values())  # one tensor where all layers share a choice
    probabilities = torch.stack(choices, 1).float().exp().cpu()  # [B, L, T, N + 1]
    head = backbone.model.get_output_embeddings()
    assert head is not None
    found = []
    for i, (row, query) in enumerate(zip(rows, queries, strict=True)):
        start = max(row.target_start, 1)  # the token at i is predicted at i - 1
        best = head(states[i, start - 1 : len(row.ids) - 1]).argmax(-1)
        at = golden[i]
        found.append(
            Selection(
                tokens=[_show(str(tokenizer.decode([token]))) for token in row.ids[:-1]],
                probabilities=probabilities[i, :, : len(row.ids) - 1],
                answer_from=start - 1,
                golden=at,
                right=best.tolist() == list(row.ids[start:]),
                question=f"{query.prompt} → {query.target}",
                edit="" if at is None else edited.requests[at].statement,
            )
        )
    return found


def scalars(inside: Profile, outside: Profile | None) -> dict[str, float]:
    """Means over layers, by their names in TensorBoard."""
    values = {"zero_gist_in_scope": inside.zero, "golden": inside.golden, "entropy": inside.entropy}
    if outside is not None:
        values["zero_gist_out_of_scope"] = outside.zero
    return {f"selection/{name}": float(value.mean()) for name, value in values.items()}


def right_and_wrong(selections: Sequence[Selection]) -> list[Selection]:
    """The first query that is answered rightly and the first that is not, or whichever there is."""
    firsts = [next((s for s in selections if s.right is right), None) for right in (True, False)]
    return [s for s in firsts if s is not None]


def _rephrase(record: EditRecord) -> Query | None:
    request = record.request
    own = [Query(request.prompt, (request.target,))] if request.prompt and request.target else []
    return next((q for q in (*record.rephrases, *own) if q.prompt), None)


def _show(token: str) -> str:
    """A token's text, visible also where it is white space."""
    return token.replace("\n", "↵").strip() or "␣"
