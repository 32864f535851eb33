"""Records to tensors for editors that are trained through the edited model: edits, and what is asked of each.

N edits, B queries, T tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot, stable_hash
from datamodules.tensors import Tensors
from datamodules.tokens import Encoded, encode, pad, pad_id
from modules.gist.batch import Kind, asked_first, queries_by_kind, subjects_of_pools


@dataclass
class EditBatch(Tensors):
    """One micro-batch. Every pool is edited by itself: by its one edit, or by several together.

    The edits of a pool are all those of its records, and the related hops of its queries.

    Args:
        edits, edits_mask, edits_answer: [N, T], right-padded, and the tokens that an edit's own loss is of.
        edit_pool: the pool of each edit [N].
        edit_seed: for what training draws of each edit [N]: a function of its record and place, not of the rank.
        queries, queries_mask, queries_answer: [B, T], right-padded, and the tokens that are the answer.
        query_pool: the pool that each query is asked of [B].
        in_scope: queries that the edit is to change [B]; the others it must leave alone.
        pools: how many there are.
        records: ids, for messages.
    """

    edits: Tensor
    edits_mask: Tensor
    edits_answer: Tensor
    edit_pool: Tensor
    edit_seed: Tensor
    queries: Tensor
    queries_mask: Tensor
    queries_answer: Tensor
    query_pool: Tensor
    in_scope: Tensor
    pools: int
    records: list[str]

    @property
    def visible(self) -> Tensor:
        """Which edits the model of each query has [B, N]."""
        return self.query_pool[:, None] == self.edit_pool[None]

    def __len__(self) -> int:
        return len(self.records)


@dataclass
class EditQueries:
    """What is asked of an edited model in training.

    Args:
        generality: queries of each record that its edit is to change.
        rates: how often each kind of them is drawn, among those that the record has. `{rephrase: 1}` as published with
            MEND; `{request: 1}`, the edit's own prompt, as EasyEdit does it. `portability` is what follows from the
            edit (of UniEdit: multi-hop, relation reversal, same entity), `multi_hop` MQuAKE's questions.
        hops: edit the facts that a drawn query rests on into its pool, all of them, as UniEdit's evaluation does with
            those that the model does not know.
        locality: queries of each record that its edit must leave alone.
        locality_from: `record`: its own locality queries, where it has any; `others`: the edits of other pools of the
            micro-batch, which are as likely as its own to be edited (published with MEND). Where there are none, the
            other is taken.
        max_edit_tokens: records with a longer edit are left out of training.
        max_query_tokens: and those with a longer query, its answer included.
    """

    generality: int = 1
    rates: dict[Kind, float] = field(default_factory=lambda: {"rephrase": 1.0})
    locality: int = 1
    locality_from: Literal["record", "others"] = "record"
    max_edit_tokens: int = 128
    max_query_tokens: int = 256
    hops: bool = True

    def __post_init__(self) -> None:
        known = [k for k in Kind.__args__ if k != "locality"]  # type: ignore[attr-defined]
        wrong = [k for k in self.rates if k not in known]
        if wrong or any(r < 0 for r in self.rates.values()) or not any(self.rates.values()):
            raise ValueError(
                f"queries.rates must give non-negative rates, not all zero, to some of {', '.join(known)}; "
                f"got {self.rates}"
            )
        if self.generality < 1 or self.locality < 0:
            raise ValueError(
                f"queries.generality must be at least 1 and locality at least 0, got {self.generality}, {self.locality}"
            )


class Scored(NamedTuple):
    """Token ids, and the first of those that a loss is of."""

    ids: tuple[int, ...]
    start: int

    @property
    def answer(self) -> list[bool]:
        return [i >= self.start for i in range(len(self.ids))]


def scored(encoded: Encoded, prompt: str) -> Scored:
    """The answer's tokens are scored; of free text, which has no prompt, those after its first half or 12 tokens."""
    start = encoded.target_start if prompt else min(len(encoded.ids) // 2, 12)
    return Scored(encoded.ids, max(start, 1))  # nothing predicts the first token


def encode_edit(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> Scored:
    """The tokens of an edit. Its gradient is that of the target after the prompt, or of a text's later part."""
    if request.target:
        return scored(encode(tokenizer, request.prompt, request.target), request.prompt)
    return scored(encode(tokenizer, "", request.statement), "")


class _Row(NamedTuple):
    tokens: Scored
    pool: int
    in_scope: bool


class EditCollator:
    """Slots to an EditBatch. The draw of a slot's queries depends on its own seed and its micro-batch alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: EditQueries) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def fits(self, record: EditRecord) -> bool:
        """Whether a record is short enough to train on, its edits have a token to predict, and it asks anything."""
        by_kind = queries_by_kind(record)
        if not any(qs for kind, qs in by_kind.items() if kind != "locality"):
            return False
        hops = [hop for kind, qs in by_kind.items() if kind != "locality" for q in qs for hop in self._hops(q)]
        edits = [encode_edit(self.tokenizer, request) for request in (*record.requests, *hops)]
        longest = max(len(encode(self.tokenizer, q.prompt, q.target).ids) for qs in by_kind.values() for q in qs)
        short = max(len(e.ids) for e in edits) <= self.config.max_edit_tokens
        return short and longest <= self.config.max_query_tokens and all(e.start < len(e.ids) for e in edits)

    def __call__(self, slots: Sequence[Slot]) -> EditBatch:
        edits: dict[tuple[int, tuple[int, ...]], tuple[Scored, int]] = {}  # the same edit twice in a pool is made once
        edited, of_hops = subjects_of_pools(slots), {slot.pool: set[str]() for slot in slots}
        draws = [random.Random(slot.seed) for slot in slots]
        changed: list[list[Query]] = []
        for slot, draw in zip(slots, draws, strict=True):
            asked = [self._changed(draw, slot, edited[slot.pool]) for _ in range(self.config.generality)]
            hops = list(dict.fromkeys(hop for query in asked for hop in self._hops(query)))
            for i, request in enumerate((*slot.record.requests, *hops)):
                edit = encode_edit(self.tokenizer, request)
                seed = stable_hash("edit", slot.seed, i) if i else slot.seed
                edits.setdefault((slot.pool, edit.ids), (edit, seed))
            of_hops[slot.pool].update(hop.subject for hop in hops if hop.subject)
            changed.append(asked)
        rows: list[_Row] = []
        for slot, draw, asked in zip(slots, draws, changed, strict=True):
            rows += [self._row(query, slot.pool, True) for query in asked]
            for _ in range(self.config.locality):
                if query := self._unchanged(draw, slot, slots, edited[slot.pool] | of_hops[slot.pool]):
                    rows.append(self._row(query, slot.pool, False))
        pools, (made, seeds) = [pool for pool, _ in edits], zip(*edits.values(), strict=True)
        return self._tensors(made, pools, seeds, rows, [s.record.id for s in slots])

    def _hops(self, query: Query) -> tuple[EditRequest, ...]:
        return query.hops if self.config.hops else ()

    def _row(self, query: Query, pool: int, in_scope: bool) -> _Row:
        return _Row(scored(encode(self.tokenizer, query.prompt, query.target), query.prompt), pool, in_scope)

    def _changed(self, draw: random.Random, slot: Slot, subjects: set[str]) -> Query:
        """A query that follows from the record's edits; none whose hops are about what another record edits."""
        every = queries_by_kind(slot.record)
        every["locality"] = []
        others = subjects - _subjects(slot.record)
        clear: dict[Kind, list[Query]] = {
            kind: [q for q in queries if not any(hop.subject in others for hop in self._hops(q))]
            for kind, queries in every.items()
        }
        options = clear if any(clear.values()) else every
        kinds: list[Kind] = [k for k, rate in self.config.rates.items() if rate and options[k]]
        # a record that has none of the wanted kinds is asked what it has, the edit itself before all
        other: Kind = asked_first(slot.record, (k for k in options if options[k]))
        kind = draw.choices(kinds, [self.config.rates[k] for k in kinds])[0] if kinds else other
        return draw.choice(options[kind])

    def _unchanged(self, draw: random.Random, slot: Slot, slots: Sequence[Slot], subjects: set[str]) -> Query | None:
        """A query that speaks of no subject of the pool, as far as subjects are known."""
        own = _subjects(slot.record)
        near = [q for q in queries_by_kind(slot.record)["locality"] if not any(s in q.prompt for s in subjects - own)]
        edits = [r for s in slots if s.pool != slot.pool for r in s.record.requests if r.target]
        others = [Query(r.prompt, (r.target,)) for r in edits if not any(s in r.prompt for s in subjects)]
        options = (near or others) if self.config.locality_from == "record" else (others or near)
        return draw.choice(options) if options else None

    def _tensors(
        self,
        edits: Sequence[Scored],
        edit_pool: Sequence[int],
        edit_seed: Sequence[int],
        rows: Sequence[_Row],
        records: list[str],
    ) -> EditBatch:
        pools = sorted(set(edit_pool))
        number = {pool: i for i, pool in enumerate(pools)}
        ids, mask, answer = padded(self.tokenizer, edits)
        queries, queries_mask, queries_answer = padded(self.tokenizer, [row.tokens for row in rows])
        return EditBatch(
            edits=ids,
            edits_mask=mask,
            edits_answer=answer,
            edit_pool=torch.tensor([number[pool] for pool in edit_pool]),
            edit_seed=torch.tensor(edit_seed),
            queries=queries,
            queries_mask=queries_mask,
            queries_answer=queries_answer,
            query_pool=torch.tensor([number[row.pool] for row in rows]),
            in_scope=torch.tensor([row.in_scope for row in rows]),
            pools=len(pools),
            records=records,
        )


def _subjects(record: EditRecord) -> set[str]:
    return {r.subject for r in record.requests if r.subject}


def padded(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Scored]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and answer [R, T], right-padded."""
    ids, mask = pad([row.ids for row in rows], pad_id(tokenizer))
    return ids, mask, pad([row.answer for row in rows], 0)[0].bool()
