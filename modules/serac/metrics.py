"""How well a scope classifier tells queries apart, over the memory that they are asked with."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from datamodules.records import EditRecord
from modules.evaluation import without_collisions
from modules.serac.editor import SeracEdited

SORTS = ("in_scope", "out_of_scope")


def scope_answers(edited: SeracEdited, records: Sequence[EditRecord]) -> dict[str, list[bool]]:
    """For every query of the records, whose edits are all in the memory, whether the classifier is right.

    In scope, an edit's own prompt and rephrases: right where an edit of the same record is found. Out of scope, the
    locality queries but for those that name another edit's subject: right where none is found.
    """
    asked: dict[str, list[tuple[str, EditRecord]]] = {sort: [] for sort in SORTS}
    for record in without_collisions(records)[0]:
        own = [r.prompt for r in record.requests if r.target]
        asked["in_scope"] += [(p, record) for p in (*own, *(q.prompt for q in record.rephrases))]
        asked["out_of_scope"] += [(q.prompt, record) for qs in record.locality.values() for q in qs]
    found = {sort: edited.edit_of([prompt for prompt, _ in pairs]) for sort, pairs in asked.items()}
    return {
        "in_scope": [edit in r.requests for edit, (_, r) in zip(found["in_scope"], asked["in_scope"], strict=True)],
        "out_of_scope": [edit is None for edit in found["out_of_scope"]],
    }


class ScopeAccuracy(Metric):
    """Share of queries that the classifier is right about, by sort, and the mean of both (balanced accuracy)."""

    full_state_update = False
    right: Tensor
    asked: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("right", "asked"):
            self.add_state(name, torch.zeros(len(SORTS), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, answers: Mapping[str, Iterable[bool]]) -> None:
        """Add what `scope_answers` gives."""
        for i, sort in enumerate(SORTS):
            found = list(answers[sort])
            self.right[i] += sum(found)
            self.asked[i] += len(found)

    def compute(self) -> dict[str, Tensor]:
        """`in_scope`, `out_of_scope` and `accuracy`; those of which nothing was asked are left out."""
        shares = {s: self.right[i] / self.asked[i] for i, s in enumerate(SORTS) if self.asked[i]}
        return shares | ({"accuracy": torch.stack(list(shares.values())).mean()} if len(shares) == 2 else {})
