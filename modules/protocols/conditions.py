"""RippleEdits' conditions: a question tells something about an edit only where the unedited model knows what it needs.

Source: Cohen et al. 2023, arXiv 2307.12976, section 4.2, and its released test runner.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from datamodules.records import EditRecord, Query
from modules.editor import Edited
from modules.protocols.text import generated, mentions


def have_conditions(records: Iterable[EditRecord]) -> bool:
    """Whether any question of the records has a condition; those of most sources have none."""
    return any(query.conditions for record in records for query in _questions(record))


def without_failed_conditions(
    model: Edited, records: Sequence[EditRecord], batch_size: int = 32, max_new_tokens: int = 16
) -> tuple[list[EditRecord], list[int]]:
    """Leave out locality and portability questions with a condition that the unedited model does not meet.

    A condition is met where the greedy continuation of its prompt has one of its answers in it, in whole words
    (RippleEdits takes parts of words too, and 30 tokens). The records that come back can be judged by any protocol;
    a kind whose questions are all left out is gone.

    Args:
        model: the unedited model.

    Returns:
        The records without those questions, and how many each of them lost.
    """
    conditions = [condition for record in records for query in _questions(record) for condition in query.conditions]
    texts = generated(model, [condition.prompt for condition in conditions], max_new_tokens, batch_size)

    def met(kinds: Mapping[str, Sequence[Query]]) -> dict[str, tuple[Query, ...]]:
        found = {
            kind: tuple(q for q in queries if all(mentions(texts[c.prompt], c.answers) for c in q.conditions))
            for kind, queries in kinds.items()
        }
        return {kind: queries for kind, queries in found.items() if queries}

    kept = [replace(r, locality=met(r.locality), portability=met(r.portability)) for r in records]
    return kept, [len(_questions(before)) - len(_questions(after)) for before, after in zip(records, kept, strict=True)]


def _questions(record: EditRecord) -> list[Query]:
    return [q for kinds in (record.locality, record.portability) for queries in kinds.values() for q in queries]
