"""What selection does along a query's tokens, over many queries (InComeS, figure 4c and 4d, there of two queries).

L layers (1 where all share one choice), T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from datamodules.records import EditRecord
from modules.gist.analysis import Selected, Selection, in_and_out_of_scope, pools
from modules.gist.editor import GistEdited


@dataclass(frozen=True)
class Trace:
    """A Selection without the probabilities of single edits, which a large pool has many of: each tensor [L, T]."""

    zero: Tensor
    of_golden: Tensor
    entropy: Tensor
    answer_from: int
    hits: Sequence[bool] | None

    @property
    def right(self) -> bool | None:
        return None if self.hits is None else all(self.hits)

    @classmethod
    def of(cls, selection: Selection) -> "Trace":
        return cls(
            selection.zero.clone(),
            selection.of_golden.clone(),
            selection.entropy,
            selection.answer_from,
            selection.hits,
        )


@dataclass(frozen=True)
class Traces:
    """What was asked of pools of one size.

    Args:
        inside, outside: queries in and out of the scope of the pool's edits.
        examples: whole selections of the first pool in scope, the first one answered rightly and the first one not.
    """

    edits: int
    inside: list[Trace]
    outside: list[Trace]
    examples: list[Selection]


def traces(
    edited: GistEdited,
    records: Sequence[EditRecord],
    size: int,
    queries: int = 100,
    progress: Callable[[int], None] = lambda _: None,
) -> Traces:
    """Ask about `queries` edits, in as many pools of `size` as that takes, one query in and one out of scope of each.

    Args:
        edited: under the first edits of all records.
        progress: called with the number of edits asked about since the last call.

    Raises:
        ValueError: where there are fewer records than `size`.
    """
    if size > len(records):
        raise ValueError(f"a pool of {size} edits cannot be made of {len(records)} records")
    found = Traces(size, [], [], [])
    for i, pool in enumerate(islice(pools(edited, records, size), -(-queries // size))):
        most = min(size, queries - i * size)
        inside, outside = in_and_out_of_scope(pool, records[i * size : (i + 1) * size], most)
        found.inside.extend(map(Trace.of, inside))
        found.outside.extend(map(Trace.of, outside))
        told = {s.right for s in found.examples}
        for selection in inside:
            if selection.right not in told:
                told.add(selection.right)
                found.examples.append(selection)
        progress(most)
    return found


@dataclass(frozen=True)
class Place:
    """Means over queries at one place, of the means over layers.

    Args:
        at: places before the answer: 0 is the token that predicts the answer's first one, -1 the token before it.
        queries: how many have a token there.
        zero, golden: probabilities of the zero-gist and the golden gist.
        entropy: of the choice, in nats.
    """

    at: int
    queries: int
    zero: float
    golden: float
    entropy: float


def by_place(found: Sequence[Selected], share: float = 0.25) -> list[Place]:
    """The traces' mean, place by place, aligned where the answer begins.

    Args:
        share: places that less than this share of the queries have are left out: what they show is those few.
    """
    rows: dict[int, list[tuple[float, float, float]]] = {}
    for trace in found:
        means = zip(*(t.mean(0).tolist() for t in (trace.zero, trace.of_golden, trace.entropy)), strict=True)
        for t, values in enumerate(means):
            rows.setdefault(t - trace.answer_from, []).append(values)
    return [
        Place(at, len(values), *(sum(column) / len(values) for column in zip(*values, strict=True)))
        for at, values in sorted(rows.items())
        if len(values) >= share * len(found)
    ]


class Answered(NamedTuple):
    """The answers' tokens of one number, over queries.

    Args:
        token: from 1.
        queries: whose answers are so long.
        right: share of them whose token is the most probable one, given those before it.
        golden: mean probability of the golden gist where the token is predicted.
    """

    token: int
    queries: int
    right: float
    golden: float


def by_answer_token(found: Sequence[Trace], most: int = 6) -> list[Answered]:
    """What becomes of answers token by token: a gist that is found and not answered from is read badly, not selected.

    Args:
        most: tokens of longer answers beyond so many are left out.
    """
    rows: dict[int, list[tuple[float, float]]] = {}
    for trace in found:
        if trace.hits is None:
            continue
        golden = trace.of_golden.mean(0)[trace.answer_from :].tolist()
        for n, row in enumerate(zip(map(float, trace.hits), golden, strict=True), 1):
            if n <= most:
                rows.setdefault(n, []).append(row)
    return [
        Answered(n, len(values), *(sum(column) / len(values) for column in zip(*values, strict=True)))
        for n, values in sorted(rows.items())
    ]
