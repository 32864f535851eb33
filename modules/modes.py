"""Consecutive editing: batches of edits one on top of another, and what is retained on the way.

Batches of one edit are sequential editing, larger ones consecutive batch editing. At each checkpoint all edits so far
are evaluated, so a figure says what the model still knows, not what it knew right after each edit.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, TokenAccuracy
from modules.interventions import LowRank, linear
from modules.judging import Evaluation, Judge, Make, conflicting_edits, refuse_unasked, settings_of
from modules.meter import Meter, now


class Norms(NamedTuple):
    """Sums of a matrix's absolute values (entrywise L1 norms): before the edits, after them, and of their difference.

    Their growth with the number of edits is EAC's figure 2.
    """

    unedited: float
    edited: float
    change: float


@dataclass(frozen=True)
class Checkpoint:
    """The state after a number of edits.

    Attributes:
        evaluation: of all records edited so far, whose number is its `pool_size`; seconds and `queries` are counted
            from the start, `edit_bytes` are the most of any batch, `context_tokens` at this checkpoint.
        first: aggregates over the records of the first checkpoint alone: what later edits leave of the earliest.
        norms: of each edited matrix by name; empty where the editor changes none.
    """

    evaluation: Evaluation
    first: dict[str, dict[str, Any]]
    norms: dict[str, Norms]


def consecutive(
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    batch: int = 1,
    checkpoints: Sequence[int] | None = None,
    judge: Judge | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    at_checkpoint: Callable[[Checkpoint], None] | None = None,
    at_end: Callable[[Edited], None] | None = None,
) -> list[Checkpoint]:
    """Edit the records batch after batch, each on top of all earlier ones, and judge all so far at checkpoints.

    Questions and cases that any other record's edit leaves without a right answer are left out from the start, so that
    every checkpoint asks the same of a record.

    Args:
        batch: records of one edit.
        checkpoints: numbers of records; by default 1, 10, 100, ... Each is moved to the end of its batch, and the end
            of all is always one.
        judge: the protocol; by default token accuracy, compared with `backbone`.
        seed: of the bootstrap.
        progress: called with the number of records edited or evaluated since the last call (see `work`).
        at_checkpoint: called with each checkpoint as it is reached.
        at_end: called with the model under all edits.

    Raises:
        ValueError: without records, for a batch or checkpoint below 1, for an editor that is given each record's own
            edit, for records that the protocol cannot judge or that all contradict each other; and whatever the editor
            raises, NotImplementedError where it cannot edit what is edited.
    """
    stops = stops_of(len(records), batch, checkpoints)
    if editor.own_edit_only:
        raise ValueError(f"{editor.name} has only each record's own edit: there is nothing to edit consecutively")
    judge = judge or TokenAccuracy(Answers(Edited(backbone)))
    judge.check(records)
    cases = judge.cases(records)
    refuse_unasked(cases)
    judge.ask_unedited([case for case in cases if case.asked])
    found: list[Checkpoint] = []
    editing, answer_seconds = Meter(backbone), 0.0
    queries = 0
    edited: Edited | None = None
    with ExitStack() as stack:
        for at in range(0, len(records), batch):
            requests = [request for record in records[at : at + batch] for request in record.requests]
            with editing.running():
                edited = on_top(stack, editor, backbone, edited, requests)
            done = min(at + batch, len(records))
            _tell(progress, done - at)
            if done not in stops:
                continue
            asked, ready = [case for case in cases[:done] if case.asked], now(backbone)
            results = judge.results(judge.ask(edited, asked), _not_anew(editor)) if asked else []
            answer_seconds += now(backbone) - ready
            settings = settings_of(judge, cases[:done], results, seed) | {"batch": batch}
            settings["conflicting_edits"] = conflicting_edits(records[:done])
            if prompts := judge.prompts(asked):
                queries += len(prompts)
                tokens = sum(edited.context_tokens(prompts)) / len(prompts)
                settings |= {"queries": queries, "context_tokens": tokens}
            aggregates = judge.summary(results, seed)
            cost = (editing.seconds, editing.peak, answer_seconds)
            evaluation = Evaluation(editor.name, done, results, aggregates, *cost, settings)
            first = judge.summary(results[: sum(case.asked for case in cases[: stops[0]])], seed)
            found.append(Checkpoint(evaluation, first, norms(backbone, edited.weight_changes())))
            _tell(progress, done)
            if at_checkpoint:
                at_checkpoint(found[-1])
        if at_end and edited is not None:
            at_end(edited)
    return found


def stops_of(count: int, batch: int, checkpoints: Sequence[int] | None = None) -> list[int]:
    """The checkpoints among `count` records, in order (see `consecutive`).

    Raises:
        ValueError: without records, or for a batch or checkpoint below 1.
    """
    wanted = [10**i for i in range(len(str(count)))] if checkpoints is None else list(checkpoints)
    if count < 1 or batch < 1 or min(wanted, default=1) < 1:
        raise ValueError(
            f"needs records, a batch and checkpoints of at least 1; got {count} records, batch {batch}, checkpoints "
            f"{wanted}"
        )
    return sorted({min(-(-stop // batch) * batch, count) for stop in (*wanted, count)})


def work(count: int, batch: int, checkpoints: Sequence[int] | None = None) -> int:
    """The total of what `consecutive` tells `progress`."""
    return count + sum(stops_of(count, batch, checkpoints))


@torch.no_grad()
def norms(backbone: Backbone, changes: Mapping[str, LowRank | Tensor]) -> dict[str, Norms]:
    """Entrywise L1 norms of matrices under changes (see `Edited.weight_changes`)."""
    found = {}
    for name, change in changes.items():
        layer = linear(backbone.model, name)
        weight: Tensor = layer.weight.float()  # type: ignore[operator, assignment]
        delta = (change.weight()[0] if isinstance(change, LowRank) else change).to(weight)  # [d_in, d_out]
        delta = delta.T if isinstance(layer, nn.Linear) else delta
        found[name] = Norms(*(float(m.abs().sum()) for m in (weight, weight + delta, delta)))
    return found


def on_top(
    stack: ExitStack, editor: Editor, backbone: Backbone, edited: Edited | None, requests: Sequence[EditRequest]
) -> Edited:
    """The model under further edits, on top of those of `edited` where there are any; `stack` ends what it entered."""
    if edited is None:
        return stack.enter_context(editor.edit(backbone, requests))
    # where the edits are the object's alone, the old one need not be kept: a thousand of them would fill the memory
    add = getattr(edited, "add", None)
    return add(requests) if add else stack.enter_context(edited.edit(requests))


def _not_anew(editor: Editor) -> Make:
    """What would make all edits so far anew, in one call: they would no longer be those of this mode."""

    def refused(_: Sequence[EditRequest]) -> AbstractContextManager[Edited]:
        raise NotImplementedError(
            f"{editor.name} cannot edit on top of edits, which this protocol's related facts need here; take --mode "
            "single or batch"
        )

    return refused


def _tell(progress: Callable[[int], None] | None, count: int) -> None:
    if progress:
        progress(count)
