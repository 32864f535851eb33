"""DistillMIKE's fact retrieval Ret(q): which edit of a memory a query is about, if any (section 4.1.1, figure 2)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from datamodules.records import EditRequest

if TYPE_CHECKING:
    from modules.memory.edit_memory import EditMemory

Case = Literal["exact", "subject", "ambiguous", "unmatched"]


class Retrieved(NamedTuple):
    """What a query retrieves, and by which of the four cases.

    Attributes:
        request: the edit; None if and only if unmatched.
        case: `exact`: subject and relation of the edit; `subject`: it alone has the query's subject; `ambiguous`: the
            nearest of several edits of subjects that the query names; `unmatched`: the query names no edit's subject.
    """

    request: EditRequest | None
    case: Case


def retrieve(memory: "EditMemory", queries: Sequence[str]) -> list[Retrieved]:
    """Ret(q) of each query. An encoder is asked only where several edits match, once for all such queries.

    Raises:
        ValueError: where several edits match and the memory has no encoder.
    """
    found: list[Retrieved] = []
    ambiguous: dict[int, tuple[EditRequest, ...]] = {}
    for i, query in enumerate(queries):
        exact = memory.exact(query)
        matched = () if exact else memory.of_subject(query)
        if exact:
            found.append(Retrieved(exact, "exact"))
        elif len(matched) == 1:
            found.append(Retrieved(matched[0], "subject"))
        else:
            found.append(Retrieved(None, "unmatched"))
            if matched:
                ambiguous[i] = matched
    if ambiguous:
        asked = [queries[i] for i in ambiguous]
        for i, best in zip(ambiguous, memory.nearest(asked, 1, among=list(ambiguous.values())), strict=True):
            found[i] = Retrieved(best[0][0], "ambiguous")
    return found
