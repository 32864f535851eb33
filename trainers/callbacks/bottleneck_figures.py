"""What IBKE's bottlenecks make of validation edits, as scalars, figures and points for TensorBoard's projector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.gradients import gradient_factors
from modules.trained.ibke import IBKE, IbkeNetwork
from trainers.callbacks.common import EveryNth, untouched, validation_records, writers
from trainers.drawing.bottleneck import latents_by_relation, token_scales

CHUNK = 16  # edits of one pass
ACTIVE = 0.01  # variance over edits from which a unit counts as active (Burda et al., arXiv 1509.00519)
PROJECTOR_WIDTH = 50  # principal components that are handed to the projector


@dataclass(frozen=True)
class SeenEdit:
    """What the bottlenecks make of one edit, each by the matrix it is for.

    Args:
        tokens: of the edit, as text.
        mean: of the latents [l_m, d_m].
        information: that they carry, in nats.
        scale: how much of each token gets into the edit, 0 to 1 [tokens]; nan where a token has no gradient.
    """

    record: EditRecord
    tokens: list[str]
    mean: Mapping[str, Tensor]
    information: Mapping[str, float]
    scale: Mapping[str, Tensor]


class BottleneckFigures(L.Callback):
    """For IBKE: looks at the first edit of validation records, each by itself at the unedited model, and logs

    - bottleneck/nats/<matrix>: information of its latents, mean over edits (none where the bottleneck is off);
    - bottleneck/active_units/<matrix>: share of latent units whose mean varies over edits;
    - bottleneck/scale/<matrix>: mean scale factor of tokens;
    - bottleneck/token_scale: scale factors along the tokens of some edits (paper, figure 7a);
    - bottleneck/latents: latents in their first two principal components, coloured by relation (figure 6);
    - latents/<matrix> in TensorBoard's projector, where t-SNE and UMAP are at hand.

    All ranks do the same, since sharded weights (ZeRO-3) want every rank in every forward pass; rank 0 draws.

    Args:
        records: edits to look at.
        examples: edits whose tokens are drawn.
        every_n_validations: look at the first validation and every n-th after it.
    """

    def __init__(self, records: int = 64, examples: int = 4, every_n_validations: int = 1) -> None:
        if records < 2 or every_n_validations < 1:
            raise ValueError(
                f"records must be at least 2 and every_n_validations at least 1: {records}, {every_n_validations}"
            )
        self.records, self.examples, self.validations = records, examples, EveryNth(every_n_validations)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(pl_module, IBKE):
            raise TypeError(f"{type(pl_module).__name__} has no bottlenecks; take BottleneckFigures out")

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.validations.looks(trainer):
            return
        assert isinstance(pl_module, IBKE)
        with untouched(pl_module):
            seen = look(pl_module, validation_records(trainer, self.records))
        pl_module.log_dict(scalars(seen), sync_dist=trainer.world_size > 1)
        step = trainer.global_step
        relations = [edit.record.domain or "unknown" for edit in seen]
        latents = {name: torch.stack([edit.mean[name].flatten() for edit in seen]) for name in seen[0].mean}
        for file in writers(trainer):
            shown = [(edit.tokens, edit.scale) for edit in seen[: self.examples]]
            file.add_figure("bottleneck/token_scale", token_scales(shown), step)
            file.add_figure("bottleneck/latents", latents_by_relation(latents, relations), step)
            labels = [[relation, edit.record.request.statement] for relation, edit in zip(relations, seen, strict=True)]
            for name, points in latents.items():
                axes = principal(points, PROJECTOR_WIDTH)
                file.add_embedding(axes, labels, None, step, f"latents/{name}", metadata_header=["relation", "edit"])


@torch.no_grad()
def look(module: IBKE, records: Sequence[EditRecord]) -> list[SeenEdit]:
    """What the bottlenecks make of the first edit of each record."""
    backbone, network = module.deltas.backbone, module.deltas.network
    assert isinstance(network, IbkeNetwork)
    short = {name: name.removeprefix(backbone.parts.layers + ".") for name in network.shapes}
    collate = module.collator()
    seen = []
    for at in range(0, len(records), CHUNK):
        of = records[at : at + CHUNK]
        batch = collate([Slot(record, i, i) for i, record in enumerate(of)]).to(backbone.device)
        given = batch.edits, batch.edits_mask, batch.edits_answer
        factors, _ = gradient_factors(backbone, list(network.shapes), *given)
        found = network.look(factors)
        places = batch.edit_pool.tolist()
        # each record is a pool of its own, whose edits begin with its first one; others, and hops, follow
        for row, place in ((places.index(place), place) for place in range(len(of))):
            length = int(batch.edits_mask[row].sum())
            scale = {
                short[name]: one.scale[row, :length].where(mask[row, :length], torch.nan).cpu()
                for name, (one, mask) in found.items()
            }
            seen.append(
                SeenEdit(
                    record=of[place],
                    tokens=[str(backbone.tokenizer.decode([i])) for i in batch.edits[row, :length].tolist()],
                    mean={short[name]: one.mean[row].cpu() for name, (one, _) in found.items()},
                    information={short[n]: float(one.information()[row].sum()) for n, (one, _) in found.items()},
                    scale=scale,
                )
            )
    return seen


def scalars(seen: Sequence[SeenEdit]) -> dict[str, float]:
    """Statistics of the bottlenecks by name, over all edits."""
    found = {}
    for name in seen[0].mean:
        means = torch.stack([edit.mean[name] for edit in seen])  # [edits, l_m, d_m]
        information = [edit.information[name] for edit in seen]
        if any(information):
            found[f"bottleneck/nats/{name}"] = sum(information) / len(seen)
        found[f"bottleneck/active_units/{name}"] = float((means.var(0) > ACTIVE).float().mean())
        found[f"bottleneck/scale/{name}"] = float(torch.cat([edit.scale[name] for edit in seen]).nanmean())
    return found


def principal(points: Tensor, width: int) -> Tensor:
    """Points [n, d] by their first principal components [n, at most width]."""
    centred = points.float() - points.float().mean(0)
    u, s, _ = torch.linalg.svd(centred, full_matrices=False)
    return u[:, :width] * s[:width]
