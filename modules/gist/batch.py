"""Records to tensors for InComeS: the edits of a pool, and queries that each have one edit to find, or none.

B queries, N distinct edits, T tokens.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.readers.mquake import unedited
from datamodules.records import EditRecord, Query
from datamodules.schedule import Slot
from datamodules.tensors import Tensors
from datamodules.tokens import adds_bos, encode, pad, pad_id

Kind = Literal["request", "rephrase", "portability", "multi_hop", "locality"]
T = TypeVar("T")


@dataclass
class GistBatch(Tensors):
    """One micro-batch, one or several pools.

    Args:
        edits, edits_mask: [N, T], right-padded, equal edits of a pool stored once.
        queries, queries_mask: [B, T], right-padded.
        golden: the edit each query should read [B]; -1: none.
        visible: the edits in each query's pool [B, N].
        answer: tokens of the query that are its answer [B, T].
        teacher, teacher_positions, teacher_blocks: [B, T'] the teacher's packed rows: edit, newline, query (block 1,
            only for a query with an edit; a BOS stands before the edit) and the query alone (block 2); 0 pads.
        with_edit, alone: token i of the query is at this + i of the teacher's row, in either block [B].
        records: ids, for messages.
    """

    edits: Tensor
    edits_mask: Tensor
    queries: Tensor
    queries_mask: Tensor
    golden: Tensor
    visible: Tensor
    answer: Tensor
    teacher: Tensor
    teacher_positions: Tensor
    teacher_blocks: Tensor
    with_edit: Tensor
    alone: Tensor
    records: list[str]

    def __len__(self) -> int:
        return len(self.queries)


@dataclass
class QueryConfig:
    """Which queries a record contributes to a batch.

    Args:
        per_record: how many queries are drawn for each record.
        rates: how often each kind is drawn, among those that the record has. Locality queries are out of scope: the
            teacher sees no edit there, and the zero-gist is the right choice. A record of several edits is asked by
            these edits' own prompts and by locality queries alone.
        closing: text after the answer, scored with it: a model that only ever sees answers does not learn to end one.
        max_edit_tokens: records with a longer edit are left out of training (paper).
        max_query_tokens: and those whose edit and query are longer together (paper).
    """

    per_record: int = 1
    rates: dict[Kind, float] = field(
        default_factory=lambda: {"request": 0.3, "rephrase": 0.3, "portability": 0.1, "locality": 0.3}
    )
    closing: str = ""
    max_edit_tokens: int = 128
    max_query_tokens: int = 256

    def __post_init__(self) -> None:
        known = [k for k in Kind.__args__ if k != "multi_hop"]  # type: ignore[attr-defined]
        wrong = [k for k in self.rates if k not in known]
        if wrong or any(r < 0 for r in self.rates.values()) or not any(self.rates.values()):
            raise ValueError(
                f"queries.rates must give non-negative rates, not all zero, to some of {', '.join(known)}; "
                f"got {self.rates}"
            )
        if self.per_record < 1:
            raise ValueError(f"queries.per_record must be at least 1, got {self.per_record}")


class _Row(NamedTuple):
    query: Query
    edit: int
    in_scope: bool
    pool: int


class GistCollator:
    """Slots to a GistBatch. The draw of a slot's queries depends on its own seed and its pool alone.

    Args:
        bos: see GistConfig.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: QueryConfig, bos: bool = True) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.bos = bos and adds_bos(tokenizer)
        self.newline = encode(tokenizer, "\n", bos=False, after=".").ids

    def fits(self, record: EditRecord) -> bool:
        """Whether a record is short enough to train on (paper, section 1.5 of the methods page), and asks anything."""
        longest = max(len(encode(self.tokenizer, "", r.statement).ids) for r in record.requests)
        by_kind = {kind: qs for kind, qs in _of_one_edit(record).items() if qs}
        if not by_kind.keys() - {"locality"}:
            return False  # a bare statement, of which nothing is asked
        wanted = {kind for kind, rate in self.config.rates.items() if rate} & by_kind.keys()
        # as in `_draw`, where all locality queries may have to be left out
        asked = wanted if wanted - {"locality"} else by_kind.keys()
        queries = [(q.prompt, q.target) for kind in asked for q, _ in by_kind[kind]]
        total = longest + max(len(encode(self.tokenizer, p, t).ids) for p, t in queries) + len(self.newline)
        return longest <= self.config.max_edit_tokens and total <= self.config.max_query_tokens

    def __call__(self, slots: Sequence[Slot]) -> GistBatch:
        edit_ids: list[tuple[int, ...]] = []
        edit_pool: list[int] = []
        place: dict[tuple[int, tuple[int, ...]], int] = {}
        rows: list[_Row] = []
        subjects = subjects_of_pools(slots)
        for slot in slots:
            own: list[int] = []  # where the record's edits are
            for request in slot.record.requests:
                ids = encode(self.tokenizer, "", request.statement, bos=True).ids
                own.append(place.setdefault((slot.pool, ids), len(edit_ids)))
                if own[-1] == len(edit_ids):
                    edit_ids.append(ids)
                    edit_pool.append(slot.pool)
            draw = random.Random(slot.seed)
            for _ in range(self.config.per_record):
                query, edit = self._draw(draw, slot, subjects[slot.pool])
                rows.append(_Row(query, own[edit or 0], edit is not None, slot.pool))
        return self._tensors(edit_ids, edit_pool, rows, [s.record.id for s in slots])

    def _draw(self, draw: random.Random, slot: Slot, subjects: set[str]) -> tuple[Query, int | None]:
        """One query of a record, and which of its edits it asks about (None: it is out of scope).

        A locality query that speaks of another edit's subject is no longer out of scope.
        """
        options = _of_one_edit(slot.record)
        mine = {r.subject for r in slot.record.requests}
        options["locality"] = [
            q for q in options["locality"] if not any(s in q[0].prompt for s in subjects if s not in mine)
        ]
        kinds: list[Kind] = [k for k, rate in self.config.rates.items() if rate and options[k]]
        # a record that has none of the wanted kinds is asked what it has, the edits themselves before all
        other: Kind = asked_first(slot.record, (k for k in options if options[k]))
        kind = draw.choices(kinds, [self.config.rates[k] for k in kinds])[0] if kinds else other
        return draw.choice(options[kind])

    def _tensors(
        self, edit_ids: list[tuple[int, ...]], edit_pool: list[int], rows: list[_Row], records: list[str]
    ) -> GistBatch:
        padding = pad_id(self.tokenizer)
        queries, answers, packed, positions, blocks, with_edit, alone = [], [], [], [], [], [], []
        for row in rows:
            answer = row.query.target + self.config.closing
            encoded = encode(self.tokenizer, row.query.prompt, answer, bos=False)
            text = encoded.ids
            head = [self.tokenizer.bos_token_id] * self.bos
            ids = [*head, *text]
            # free text has no stem: its first tokens cannot be known from the edit (released code)
            start = len(head) + ((encoded.target_start if row.query.prompt else 0) or min(len(text) // 2, 12))
            queries.append(ids)
            answers.append([i >= start for i in range(len(ids))])
            context = [*edit_ids[row.edit], *self.newline] if row.in_scope else []
            first = [*context, *text] if row.in_scope else []
            packed.append([*first, *ids])
            positions.append([*range(len(first)), *range(len(ids))])
            blocks.append([1] * len(first) + [2] * len(ids))
            with_edit.append(len(context) - len(head) if row.in_scope else 0)
            alone.append(len(first))
        edits, edits_mask = pad(edit_ids, padding)
        ids, mask = pad(queries, padding)
        teacher, _ = pad(packed, padding)
        pools = torch.tensor([r.pool for r in rows])
        return GistBatch(
            edits=edits,
            edits_mask=edits_mask,
            queries=ids,
            queries_mask=mask,
            golden=torch.tensor([r.edit if r.in_scope else -1 for r in rows]),
            visible=pools[:, None] == torch.tensor(edit_pool)[None],
            answer=pad(answers, 0)[0].bool(),
            teacher=teacher,
            teacher_positions=pad(positions, 0)[0],
            teacher_blocks=pad(blocks, 0)[0],
            with_edit=torch.tensor(with_edit),
            alone=torch.tensor(alone),
            records=records,
        )


def _of_one_edit(record: EditRecord) -> dict[Kind, list[tuple[Query, int | None]]]:
    """The queries that one edit decides, with its number among the record's; None out of scope.

    Each edit is asked by its own prompt. Rephrases and portability queries are asked of a record's only edit: of
    several (MQuAKE) it is not said which one each is about, and the teacher would read the wrong one before it.
    """
    found: dict[Kind, list[tuple[Query, int | None]]] = {
        kind: [(query, None if kind == "locality" else 0) for query in queries]
        for kind, queries in queries_by_kind(record).items()
        if kind != "multi_hop"
    }
    if not record.single:
        found["rephrase"], found["portability"] = [], []
    found["request"] = [(Query(r.prompt, (r.target,)), i) for i, r in enumerate(record.requests) if r.target]
    return found


def asked_first(record: EditRecord, found: Iterator[T]) -> T:
    """The first of what a record can be asked.

    Raises:
        ValueError: where there is nothing.
    """
    for one in found:
        return one
    raise ValueError(f"the record {record.id!r} asks nothing about its edit: give it a rephrase, or leave it out")


def queries_by_kind(record: EditRecord) -> dict[Kind, list[Query]]:
    """What a record asks: its edits' own prompts, and the rest of it.

    The hops of MQuAKE's chains that are not edited do not follow from an edit: they are locality.
    """
    hops = unedited(record)
    return {
        "request": [Query(r.prompt, (r.target,)) for r in record.requests if r.target],
        "rephrase": list(record.rephrases),
        "portability": [q for qs in record.portability.values() for q in qs if q not in hops],
        "multi_hop": list(record.multi_hop),
        "locality": [*(q for qs in record.locality.values() for q in qs), *hops],
    }


def subjects_of_pools(slots: Sequence[Slot]) -> Mapping[int, set[str]]:
    found: dict[int, set[str]] = {}
    for slot in slots:
        found.setdefault(slot.pool, set()).update(r.subject for r in slot.record.requests if r.subject)
    return found
