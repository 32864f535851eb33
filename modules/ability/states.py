"""A model after so many edits: all of them in one call, or batch after batch."""

from collections.abc import Generator, Sequence
from contextlib import ExitStack

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.meter import now
from modules.modes import on_top


def check(editor: Editor, there_are: int, counts: Sequence[int], batch: int | None = None) -> None:
    """Refuse what `edited_models` cannot do, before any work.

    Raises:
        ValueError: see `check_counts`; and for an editor that is given each record's own edit.
    """
    check_counts(there_are, counts, batch)
    if editor.own_edit_only:
        raise ValueError(f"{editor.name} is given each record's own edit: general questions have none")


def check_counts(there_are: int, counts: Sequence[int], batch: int | None = None) -> None:
    """Refuse numbers of edits that cannot be, before an editor is there.

    Raises:
        ValueError: for counts that are not ascending, below 1 or above the number of records, for a batch below 1, and
            for a count that does not end a batch.
    """
    if list(counts) != sorted(set(counts)) or (counts and not 1 <= counts[0] <= counts[-1] <= there_are):
        raise ValueError(f"edits must ascend from 1 or more to {there_are}, the number of records; got {list(counts)}")
    if batch is not None and batch < 1:
        raise ValueError(f"a batch has at least one record, got {batch}")
    odd = [count for count in counts if batch and count % batch and count != there_are]
    if odd:
        raise ValueError(f"after {odd[0]} edits no batch of {batch} ends; give multiples of the batch")


def edited_models(
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    counts: Sequence[int],
    batch: int | None = None,
) -> Generator[tuple[int, Edited, float], None, None]:
    """(count, model, seconds spent on its edits) after the first so many records, in ascending order.

    A model is good until the next one is asked for. Iterate within `contextlib.closing`: the backbone is what it was
    when the iterator is closed, also after an exception.

    Args:
        counts: numbers of records.
        batch: records of one edit, each edit on top of all earlier ones; None: each count in one call, from the
            unedited model.

    Raises:
        ValueError: see `check`; and whatever the editor raises, NotImplementedError where it cannot edit what is
            edited.
    """
    check(editor, len(records), counts, batch)
    if batch is None:
        for count in counts:
            start = now(backbone)
            with editor.edit(backbone, _requests(records[:count])) as edited:
                yield count, edited, now(backbone) - start
        return
    with ExitStack() as stack:
        edited, seconds = None, 0.0
        for at in range(0, counts[-1] if counts else 0, batch):
            done = min(at + batch, len(records))
            start = now(backbone)
            edited = on_top(stack, editor, backbone, edited, _requests(records[at:done]))
            seconds += now(backbone) - start
            if done in counts:
                yield done, edited, seconds


def _requests(records: Sequence[EditRecord]) -> list[EditRequest]:
    return [request for record in records for request in record.requests]
