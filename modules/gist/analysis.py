"""What the tokens of queries select among the edits of a pool (InComeS, figure 4): asked in one forward pass, and kept.

B rows, L layers (1 where all share one choice), T tokens, N edits; the zero-gist is the last choice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from datamodules.records import EditRecord, Query
from datamodules.tokens import encode, pad, pad_id
from modules.evaluation import split_pools, without_collisions
from modules.gist.editor import GistEdited


@dataclass(frozen=True)
class Selection:
    """What the tokens of one query selected.

    Args:
        tokens: the query's tokens, without the last one, which predicts nothing of the answer.
        probabilities: [L, T, N + 1], the zero-gist last.
        answer_from: the first token that predicts a part of the answer; all after it do too.
        golden: the edit that should be read; None: the query is out of every edit's scope.
        hits: of each token of the answer, whether it is the most probable one; None: nothing was answered.
        question, edit: the query, and the statement of the golden edit, as text.
    """

    tokens: Sequence[str]
    probabilities: Tensor
    answer_from: int
    golden: int | None = None
    hits: Sequence[bool] | None = None
    question: str = ""
    edit: str = ""

    @property
    def right(self) -> bool | None:
        """Whether all tokens of the answer are the most probable ones."""
        return None if self.hits is None else all(self.hits)

    @property
    def zero(self) -> Tensor:
        """The zero-gist's probability [L, T]."""
        return self.probabilities[..., -1]

    @property
    def of_golden(self) -> Tensor:
        """The golden gist's probability [L, T]; 0 out of scope."""
        return self.probabilities[..., self.golden] if self.golden is not None else torch.zeros_like(self.zero)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the choice in nats [L, T]; ln(N + 1) is the most."""
        return torch.special.entr(self.probabilities).sum(-1)


class Selected(Protocol):
    """The part of a Selection that figures over many queries need; see there."""

    @property
    def zero(self) -> Tensor: ...

    @property
    def of_golden(self) -> Tensor: ...

    @property
    def entropy(self) -> Tensor: ...

    @property
    def answer_from(self) -> int: ...

    @property
    def right(self) -> bool | None: ...


class Profile(NamedTuple):
    """Means by layer, each [L]: over the tokens that predict a query's answer, then over queries."""

    zero: Tensor
    golden: Tensor
    entropy: Tensor


def profile(selections: Sequence[Selected]) -> Profile:
    """The mean of selections.

    Raises:
        ValueError: without any.
    """
    if not selections:
        raise ValueError("a profile needs at least one selection")

    def mean(name: str) -> Tensor:
        return torch.stack([getattr(s, name)[:, s.answer_from :].mean(1) for s in selections]).mean(0)

    return Profile(mean("zero"), mean("of_golden"), mean("entropy"))


def pools(edited: GistEdited, records: Sequence[EditRecord], size: int) -> Iterator[GistEdited]:
    """Full pools of `size` records' first edits, cut out of a pool that holds them all: no edit is encoded again."""
    place = {request.statement: i for i, request in enumerate(edited.requests)}
    for part in split_pools(records, size)[0]:
        requests = [r.request for r in part]
        yield GistEdited(edited.model, requests, edited.pool.keep([place[r.statement] for r in requests]))


def in_and_out_of_scope(
    edited: GistEdited, records: Sequence[EditRecord], most: int | None = None
) -> tuple[list[Selection], list[Selection]]:
    """What the tokens of one rephrase (or the first edit's own prompt) and of one locality query of each record select.

    Locality queries that name the subject of another edit of the pool are passed over.

    Args:
        records: all whose edits are in the pool.
        most: ask only of the first so many.
    """
    place = {request.statement: i for i, request in enumerate(edited.requests)}
    inside = [(query, place[r.request.statement]) for r in records[:most] if (query := _rephrase(r))]
    kept = without_collisions(records)[0][:most]
    outside = [next(iter(queries)) for r in kept if (queries := [q for qs in r.locality.values() for q in qs])]
    found = ask(edited, [q for q, _ in inside] + outside, [i for _, i in inside] + [None] * len(outside))
    return found[: len(inside)], found[len(inside) :]


@torch.no_grad()
def ask(
    edited: GistEdited, queries: Sequence[Query], golden: Sequence[int | None], batch_size: int = 64
) -> list[Selection]:
    """Read each query with its answer, and keep what its tokens select.

    Args:
        golden: place in the pool of the edit that each query should read; None: none.
        batch_size: queries in one forward pass.
    """
    found = []
    for at in range(0, len(queries), batch_size):
        part = slice(at, at + batch_size)
        found += _ask(edited, queries[part], golden[part])
    return found


def _ask(edited: GistEdited, queries: Sequence[Query], golden: Sequence[int | None]) -> Iterator[Selection]:
    backbone, tokenizer = edited.backbone, edited.backbone.tokenizer
    rows = [encode(tokenizer, q.prompt, q.target, bos=edited.bos) for q in queries]
    ids, mask = (t.to(backbone.device) for t in pad([r.ids for r in rows], pad_id(tokenizer)))
    trace: dict[int, Tensor] = {}
    states = edited.decode(ids, mask, trace=trace)[0].last_hidden_state  # [B, T, d]
    choices = list({id(t): t for t in trace.values()}.values())  # one tensor where all layers share a choice
    probabilities = torch.stack(choices, 1).float().exp().cpu()  # [B, L, T, N + 1]
    head = backbone.model.get_output_embeddings()
    assert head is not None
    for i, (row, query) in enumerate(zip(rows, queries, strict=True)):
        start = max(row.target_start, 1)  # the token at i is predicted at i - 1
        best = head(states[i, start - 1 : len(row.ids) - 1]).argmax(-1)
        at = golden[i]
        yield Selection(
            tokens=[_show(str(tokenizer.decode([token]))) for token in row.ids[:-1]],
            probabilities=probabilities[i, :, : len(row.ids) - 1],
            answer_from=start - 1,
            golden=at,
            hits=[a == b for a, b in zip(best.tolist(), row.ids[start:], strict=True)],
            question=f"{query.prompt} → {query.target}",
            edit="" if at is None else edited.requests[at].statement,
        )


def right_and_wrong(selections: Sequence[Selection]) -> list[Selection]:
    """The first query that is answered rightly and the first that is not, or whichever there is."""
    firsts = [next((s for s in selections if s.right is right), None) for right in (True, False)]
    return [s for s in firsts if s is not None]


def _rephrase(record: EditRecord) -> Query | None:
    """A query that the first edit decides: of several edits it is not said which one a rephrase is of."""
    request, rephrases = record.request, record.rephrases if record.single else ()
    own = [Query(request.prompt, (request.target,))] if request.prompt and request.target else []
    return next((q for q in (*rephrases, *own) if q.prompt), None)


def _show(token: str) -> str:
    """A token's text, visible also where it is white space."""
    return token.replace("\n", "↵").strip() or "␣"
