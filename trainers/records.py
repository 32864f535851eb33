"""Which records a command is on: drawn by a seed, so that more of them begin with the same ones."""

import logging
import random
from collections.abc import Callable, Sequence

from datamodules.records import EditRecord
from datamodules.sources import Source, load
from modules.backbone import Backbone
from modules.editor import Edited
from modules.evaluation import fewer_queries
from modules.protocols.conditions import have_conditions, without_failed_conditions

log = logging.getLogger(__name__)


def drawn(
    records: Callable[[Sequence[int]], list[EditRecord]],
    there_are: int,
    count: int,
    seed: int,
    queries_per_kind: int | None = None,
) -> list[EditRecord]:
    """The records that an evaluation is on: `count` of all, or all where there are fewer. More of them begin with the
    same ones.

    Args:
        records: gives those at some places.
        seed: draws the records and their queries.
        queries_per_kind: keep only so many rephrases, and locality and portability queries of each kind, of a record.

    Raises:
        ValueError: for a `queries_per_kind` below 1.
    """
    chosen = records(random.Random(seed).sample(range(there_are), there_are)[:count])  # a sample of few is of others
    return chosen if queries_per_kind is None else [fewer_queries(r, queries_per_kind, seed) for r in chosen]


def meeting_conditions(backbone: Backbone, records: list[EditRecord], batch_size: int = 32) -> list[EditRecord]:
    """Without the questions whose conditions the unedited model does not meet (RippleEdits); most records have none."""
    if not have_conditions(records):
        return records
    kept, lost = without_failed_conditions(Edited(backbone), records, batch_size)
    log.warning("%d questions are left out: the unedited model does not know what they rest on", sum(lost))
    return kept


def distinct(data: Sequence[Source], count: int, seed: int) -> list[EditRecord]:
    """At most `count` records drawn by `seed`, no two with the same first edit."""
    every = load(data)
    order = random.Random(seed).sample(range(len(every)), len(every))
    found: dict[str, EditRecord] = {}
    for at in range(0, len(order), count):
        for record in every.records(order[at : at + count]):
            found.setdefault(record.request.statement, record)
        if len(found) >= count:
            break
    return list(found.values())[:count]
