"""What the tokens of validation queries select among the edits of a pool, as figures and scalars."""

from collections.abc import Sequence

import lightning as L

from modules.gist.analysis import Profile, Selection, in_and_out_of_scope, profile, right_and_wrong
from modules.gist.editor import GistEdited, GistEditor
from trainers.callbacks.common import EveryNth, trained_editor, untouched, validation_records, writers
from trainers.drawing.selection import heat_map, layer_profile, token_trace


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
        self.records, self.examples, self.validations = records, examples, EveryNth(every_n_validations)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.validations.looks(trainer):
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


def scalars(inside: Profile, outside: Profile | None) -> dict[str, float]:
    """Means over layers, by their names in TensorBoard."""
    values = {"zero_gist_in_scope": inside.zero, "golden": inside.golden, "entropy": inside.entropy}
    if outside is not None:
        values["zero_gist_out_of_scope"] = outside.zero
    return {f"selection/{name}": float(value.mean()) for name, value in values.items()}
