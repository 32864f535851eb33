"""What a record asks of teacher and student: prompts in and out of the edits' scope, each with a target put after it.

Paper: DistillMIKE (Qiao et al.), section 4.2 and appendix I.

B queries, T tokens.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from datamodules.tensors import Tensors
from datamodules.tokens import Encoded, encode, pad, pad_id


class Question(NamedTuple):
    """A prompt, and the text at whose tokens the student is to predict what the teacher predicts."""

    prompt: str
    target: str


@dataclass
class DistillQueries:
    """Which prompts of a record are distilled, and which targets stand after them.

    Whether a prompt is in scope is not said here: the teacher's retrieval decides, as published.

    Args:
        rephrases: so many of a record's rephrases beside its edits' own prompts; by default all.
        locality: so many of its locality prompts, the first ones (published: 2 of CounterFact's 10, the one of zsRE).
        both_targets: also put the answer of before the edit after prompts in scope, and the new one after locality
            prompts, where the source names them (released code).
        per_record: draw so many of all these for each visit of a record; by default a visit asks all.
        passes: a micro-batch goes through the model in so many parts of questions of like length, each padded to its
            own longest one: CounterFact's rephrases are twice as long as its prompts. Never more than it has records.
        max_query_tokens: records with longer ones are left out. So are records that ask nothing.
    """

    rephrases: int | None = None
    locality: int = 2
    both_targets: bool = True
    per_record: int | None = None
    passes: int = 4
    max_query_tokens: int = 256

    def __post_init__(self) -> None:
        fewest = min(self.passes, 1 if self.per_record is None else self.per_record)
        if (self.rephrases or 0) < 0 or self.locality < 0 or fewest < 1:
            raise ValueError(
                "queries.rephrases and locality must not be negative, per_record and passes at least 1; got "
                f"{self.rephrases}, {self.locality}, {self.per_record}, {self.passes}"
            )


def questions_of(record: EditRecord, config: DistillQueries) -> list[Question]:
    """All that is distilled of a record, each once: its edits' prompts, its rephrases, and its locality prompts."""
    request = record.request
    # of several edits it is not said which one a rephrase is of
    old, new = (request.old_target, request.target) if record.single else (None, None)
    asked = [(r.prompt, (r.target, r.old_target)) for r in record.requests if r.target]
    asked += [(q.prompt, (q.target, old)) for q in record.rephrases[: config.rephrases]]
    near = [q for queries in record.locality.values() for q in queries][: config.locality]
    asked += [(q.prompt, (q.target, new)) for q in near]
    wanted = 2 if config.both_targets else 1
    pairs = [Question(prompt, t) for prompt, targets in asked if prompt for t in targets[:wanted] if t and t.strip()]
    return list(dict.fromkeys(pairs))


@dataclass
class DistillBatch(Tensors):
    """One micro-batch, the shortest queries first.

    Args:
        queries, queries_mask, queries_answer: prompts with their targets [B, T], right-padded, and the target's tokens.
        record: the record that each query is of [B].
        asked: the same queries as text.
        records: ids.
        passes: what goes through the model together: first row, end, and tokens of the longest one.
    """

    queries: Tensor
    queries_mask: Tensor
    queries_answer: Tensor
    record: Tensor
    asked: list[Question]
    records: list[str]
    passes: list[tuple[int, int, int]]

    def __len__(self) -> int:
        return len(self.records)


class DistillCollator:
    """Slots to a DistillBatch. What is drawn of a record depends on its slot's own seed alone."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DistillQueries) -> None:
        self.tokenizer = tokenizer
        self.config = config

    def fits(self, record: EditRecord) -> bool:
        """Whether a record has an edit of a prompt, all its questions are short enough, and every target follows a
        token that can predict it."""
        if not any(r.prompt.strip() and r.target.strip() for r in record.requests):
            return False
        rows = [encode(self.tokenizer, q.prompt, q.target) for q in questions_of(record, self.config)]
        return all(len(row.ids) <= self.config.max_query_tokens and row.target_start for row in rows)

    def __call__(self, slots: Sequence[Slot]) -> DistillBatch:
        every: list[tuple[int, Question, Encoded]] = []
        for i, slot in enumerate(slots):
            questions = questions_of(slot.record, self.config)
            if self.config.per_record is not None:
                draw = random.Random(slot.seed)
                questions = draw.sample(questions, min(self.config.per_record, len(questions)))
            every += [(i, q, encode(self.tokenizer, q.prompt, q.target)) for q in questions]
        every.sort(key=lambda one: len(one[2].ids))
        record, asked, rows = zip(*every, strict=True)
        ids, mask = pad([row.ids for row in rows], pad_id(self.tokenizer))
        answer, _ = pad([[i >= row.target_start for i in range(len(row.ids))] for row in rows], 0)
        # every record asks something, and all ranks have as many of them: under ZeRO-3 all must make as many passes
        count = min(self.config.passes, len(slots))
        ends = [len(rows) * i // count for i in range(count + 1)]
        passes = [(a, b, len(rows[b - 1].ids)) for a, b in pairwise(ends)]
        names = [slot.record.id for slot in slots]
        return DistillBatch(ids, mask, answer.bool(), torch.tensor(record), list(asked), names, passes)
