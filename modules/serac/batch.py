"""Records to tensors for SERAC: pairs of queries and edits in and out of scope, and answers in scope.

N edits, one a record; Q queries; B scored queries; T tokens.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from datamodules.tensors import Tensors
from datamodules.tokens import encode
from modules.gist.batch import Kind, asked_first, queries_by_kind
from modules.hypernetwork.batch import Scored, padded, scored
from modules.serac.encoder import TextTokens
from modules.serac.negatives import HardConfig, HardNegatives
from modules.serac.scope import ScopeConfig


@dataclass
class SeracBatch(Tensors):
    """One micro-batch. Tokens of edits and queries are the classifier's, all others those of the language models.

    Args:
        edits, edits_mask: [N, T], right-padded.
        queries, queries_mask: [Q, T].
        positive, negative: the weight of each pair in the loss [Q, N]; over an edit's pairs either sums to 1, or is 0
            where it has none.
        readings, readings_mask, readings_answer: [B, T] an edit's statement and a query, and the tokens of its answer.
        plain, plain_mask, plain_answer: [B, T] the same queries alone, with as many answer tokens in each row.
        own: the query and the edit of each reading [B, 2].
        share: of each reading in its term of the loss [B]; over a record's readings it sums to 1.
        in_scope: readings whose answer follows from the edit [B]; the others are there for the soft mixture alone.
        records: ids, for messages.
    """

    edits: Tensor
    edits_mask: Tensor
    queries: Tensor
    queries_mask: Tensor
    positive: Tensor
    negative: Tensor
    readings: Tensor
    readings_mask: Tensor
    readings_answer: Tensor
    plain: Tensor
    plain_mask: Tensor
    plain_answer: Tensor
    own: Tensor
    share: Tensor
    in_scope: Tensor
    records: list[str]

    def __len__(self) -> int:
        return len(self.records)


@dataclass
class SeracQueries:
    """Which queries a record contributes. Of a record of several edits the first one is taken, and
    asked by its own prompt alone: which of them a rephrase is about is not said.

    Args:
        positives: queries of each record that are in scope.
        rates: how often each kind of them is drawn, among those that the record has; `portability` counts as in scope
            only where it is given a rate.
        negatives: queries of each record that are out of scope: its own locality queries, or hard negatives.
        pairs: what an edit is told apart from: `own`, its record's negatives (released: the row's own pair); `pool`,
            half of the weight on these, half on the queries of the pool's other records.
        hard: hard negatives.
        max_edit_tokens: records with a longer statement are left out of training; in tokens of the language models.
        max_query_tokens: and those with a longer query, its answer included.
    """

    positives: int = 1
    rates: dict[Kind, float] = field(default_factory=lambda: {"request": 0.5, "rephrase": 0.5})
    negatives: int = 1
    pairs: Literal["own", "pool"] = "own"
    hard: HardConfig = field(default_factory=HardConfig)
    max_edit_tokens: int = 128
    max_query_tokens: int = 256

    def __post_init__(self) -> None:
        known = ["request", "rephrase", "portability"]
        wrong = [k for k in self.rates if k not in known]
        if wrong or any(r < 0 for r in self.rates.values()) or not any(self.rates.values()):
            raise ValueError(
                f"queries.rates must give non-negative rates, not all zero, to some of {', '.join(known)}; "
                f"got {self.rates}"
            )
        if self.positives < 1 or self.negatives < 1:
            raise ValueError(
                f"queries.positives and negatives must be at least 1, got {self.positives}, {self.negatives}"
            )


class _Asked(NamedTuple):
    query: Query
    slot: int
    in_scope: bool


class SeracCollator:
    """Slots to a SeracBatch. What is drawn of a slot depends on its own record and seed alone; which pairs there are,
    on its pool too.

    Args:
        tokenizer: of the language models.
        scope: what the classifier reads of an edit, and in which tokens.
        hard: where hard negatives are drawn from; None: nowhere.
        mixture: queries out of scope have answers to be scored too.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scope: ScopeConfig,
        config: SeracQueries,
        hard: HardNegatives | None = None,
        mixture: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.scope = scope
        self.tokens = TextTokens(scope.encoder)
        self.config = config
        self.hard = hard
        self.mixture = mixture

    def fits(self, record: EditRecord) -> bool:
        """Whether a record is short enough to train on, and asks anything in scope."""
        options = _of_one_edit(record)
        if not any(options[kind] for kind in _IN_SCOPE):
            return False
        queries = [encode(self.tokenizer, q.prompt, q.target) for qs in options.values() for q in qs]
        statement = encode(self.tokenizer, "", record.request.statement)
        longest = max(len(encoded.ids) for encoded in queries)
        return len(statement.ids) <= self.config.max_edit_tokens and longest <= self.config.max_query_tokens

    def __call__(self, slots: Sequence[Slot]) -> SeracBatch:
        asked = self._asked(slots)
        edits, edits_mask = self.tokens([self.scope.text(slot.record.request) for slot in slots])
        queries, queries_mask = self.tokens([a.query.prompt for a in asked])
        positive, negative = _pairs(slots, asked, self.config.pairs)
        answered = [i for i, a in enumerate(asked) if a.in_scope or self.mixture]
        rows = [self._reading(slots[asked[i].slot].record.request, asked[i].query) for i in answered]
        readings, readings_mask, readings_answer = padded(self.tokenizer, [reading for reading, _ in rows])
        plain, plain_mask, plain_answer = padded(self.tokenizer, [alone for _, alone in rows])
        own = torch.tensor([[i, asked[i].slot] for i in answered])
        in_scope = torch.tensor([asked[i].in_scope for i in answered])
        alike = (own[:, None, 1] == own[None, :, 1]) & (in_scope[:, None] == in_scope[None])  # [B, B]
        return SeracBatch(
            edits=edits,
            edits_mask=edits_mask,
            queries=queries,
            queries_mask=queries_mask,
            positive=positive,
            negative=negative,
            readings=readings,
            readings_mask=readings_mask,
            readings_answer=readings_answer,
            plain=plain,
            plain_mask=plain_mask,
            plain_answer=plain_answer,
            own=own,
            share=1 / alike.sum(1),
            in_scope=in_scope,
            records=[slot.record.id for slot in slots],
        )

    def _asked(self, slots: Sequence[Slot]) -> list[_Asked]:
        asked = []
        for i, (record, _, seed) in enumerate(slots):
            draw, options = random.Random(seed), _of_one_edit(record)
            asked += [_Asked(self._positive(draw, record, options), i, True) for _ in range(self.config.positives)]
            drawn = [self._negative(draw, record, options["locality"]) for _ in range(self.config.negatives)]
            asked += [_Asked(query, i, False) for query in drawn if query]
        return asked

    def _positive(self, draw: random.Random, record: EditRecord, options: Mapping[Kind, list[Query]]) -> Query:
        kinds: list[Kind] = [k for k, rate in self.config.rates.items() if rate and options[k]]
        if not kinds:  # it is asked what it has, the edit itself before all
            return draw.choice(asked_first(record, (options[k] for k in _IN_SCOPE if options[k])))
        return draw.choice(options[draw.choices(kinds, [self.config.rates[k] for k in kinds])[0]])

    def _negative(self, draw: random.Random, record: EditRecord, own: Sequence[Query]) -> Query | None:
        hard = self.hard is not None and draw.random() < self.hard.config.rate
        if (hard or not own) and self.hard is not None:
            found = self.hard.draw(record, self.scope.text(record.request), draw)
            return found or (draw.choice(own) if own else None)
        return draw.choice(own) if own else None

    def _reading(self, request: EditRequest, query: Query) -> tuple[Scored, Scored]:
        """A query after the edit's statement, and alone; of its answer the tokens that both have are scored."""
        reading = encode(self.tokenizer, query.prompt, query.target, context=request.statement + " ").ids
        alone = scored(encode(self.tokenizer, query.prompt, query.target), query.prompt)
        tail = 0  # without a prompt, a leading space may make an answer's first token another one
        while tail < len(alone.ids) - alone.start and reading[-1 - tail] == alone.ids[-1 - tail]:
            tail += 1
        return Scored(reading, len(reading) - tail), Scored(alone.ids, len(alone.ids) - tail)


_IN_SCOPE: tuple[Kind, ...] = ("request", "rephrase", "portability")


def _of_one_edit(record: EditRecord) -> dict[Kind, list[Query]]:
    """What a record asks that its first edit alone decides."""
    by_kind = queries_by_kind(record)
    if not record.single:  # it is not said which of its edits these are about
        by_kind |= {"rephrase": [], "portability": []}
        by_kind["request"] = queries_by_kind(replace(record, requests=record.requests[:1]))["request"]
    return {kind: queries for kind, queries in by_kind.items() if kind != "multi_hop"}


def _pairs(slots: Sequence[Slot], asked: Sequence[_Asked], pairs: str) -> tuple[Tensor, Tensor]:
    """The weights of pairs in and out of scope, each [Q, N]; see `SeracBatch`."""
    own = torch.tensor([a.slot for a in asked])[:, None] == torch.arange(len(slots))  # [Q, N]
    in_scope = torch.tensor([a.in_scope for a in asked])[:, None]
    inside, outside = _shares(own & in_scope), _shares(own & ~in_scope)
    if pairs == "pool":
        others = _shares(torch.tensor([[_apart(slots, a, j) for j in range(len(slots))] for a in asked]))
        has = outside.sum(0) > 0, others.sum(0) > 0
        outside = (outside + others) / (has[0].float() + has[1].float()).clamp(min=1)
    return inside, outside


def _apart(slots: Sequence[Slot], asked: _Asked, j: int) -> bool:
    """Whether a query of one record is known to be out of another one's scope, both being of one pool."""
    mine, other = slots[asked.slot].record.request, slots[j].record.request
    if j == asked.slot or slots[j].pool != slots[asked.slot].pool:
        return False
    same = mine.statement == other.statement or bool(mine.prompt and mine.prompt == other.prompt)
    return not same and not (other.subject and other.subject in asked.query.prompt)


def _shares(pairs: Tensor) -> Tensor:
    """Pairs [Q, N] -> weights that sum to 1 over each edit's pairs."""
    return pairs.float() / pairs.sum(0).clamp(min=1)
