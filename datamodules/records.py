"""The one record type that every reader produces and every editor consumes.

A record is one published case: what is to be edited, and the questions by which the edit is judged. Nothing here knows
of tokens, models or files.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EditRequest:
    """One edit: a prompt with its new target, or free text (`text`) where the edit is not a prompt and a target.

    Args:
        prompt: the query whose answer changes; empty for a free-text edit.
        target: the new answer; empty for a free-text edit.
        subject: the entity the edit is about, where the source names it; a substring of `prompt`.
        text: a whole statement of the edit. Where it is given, editors that read statements use it in place of
            prompt + target.
        old_target: the answer before the edit, where the source names it.
        fact: ids of the two entities that the edit connects, head and tail, where the source names them (UniEdit). Of a
            tail that is no entity: its relation and value.
    """

    prompt: str = ""
    target: str = ""
    subject: str | None = None
    text: str | None = None
    old_target: str | None = None
    fact: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        if self.fact is not None:  # JSON has lists only
            object.__setattr__(self, "fact", tuple(self.fact))
        if not (self.text and self.text.strip()) and not (self.prompt.strip() and self.target.strip()):
            raise ValueError(
                f"an edit needs either `text`, or a non-empty `prompt` and `target`; "
                f"got prompt={self.prompt!r}, target={self.target!r}, text={self.text!r}"
            )

    @property
    def statement(self) -> str:
        """The edit as one sentence: its text, or "prompt target."."""
        if self.text:
            return self.text
        sentence = join(self.prompt, self.target)
        return sentence if sentence.endswith((".", "!", "?")) else sentence + "."


@dataclass(frozen=True)
class Query:
    """A prompt and what counts as its answer: `answers[0]` is the target that is scored, the rest are aliases of it.

    An empty prompt is allowed (free text to be predicted from its first token); an empty answer is not.

    Args:
        hops: the facts that the answer rests on besides the record's own edits, where the source names them. A model
            that does not know one of them cannot answer however well it is edited, so UniEdit edits it in before.
        criteria: what the query tests, by the names of the source (UniEdit: see `readers.uniedit`).
        conditions: what the unedited model must be able to answer for this query to tell anything about an edit, where
            the source names it (RippleEdits).
    """

    prompt: str
    answers: tuple[str, ...]
    hops: tuple[EditRequest, ...] = ()
    criteria: tuple[str, ...] = ()
    conditions: "tuple[Query, ...]" = ()

    def __post_init__(self) -> None:
        if not self.answers or not all(isinstance(a, str) and a.strip() for a in self.answers):
            raise ValueError(f"query {self.prompt!r} needs at least one non-empty answer, got {self.answers!r}")

    @property
    def target(self) -> str:
        return self.answers[0]


@dataclass(frozen=True)
class EditRecord:
    """One case of a data set.

    Args:
        id: the published record's id, or source and index where it has none.
        requests: the edits of this case (one, except in multi-edit sets such as MQuAKE).
        rephrases: the same question in other words (generality). Of several edits it is not said which one each is of,
            nor of which one a portability query follows: see `single`.
        locality: queries whose answers must not change, by kind.
        portability: queries whose answers follow from the edit, by kind (one hop, alias, ...).
        multi_hop: questions that need several facts, among them the edited ones; any one of them counts (MQuAKE).
        domain: the relation or topic, where known; for figures and for hard negatives.
        generation: prompts about the edit's subject that a model goes on from freely; what it writes is judged as a
            text, not by an answer (CounterFact). Published ones may be repeated, and then weigh more.
        attribute: queries about other subjects that truly have the new target (CounterFact).
        target_id: the new target's id, where the source names it; with `domain` it tells reference texts.
    """

    id: str
    requests: tuple[EditRequest, ...]
    rephrases: tuple[Query, ...] = ()
    locality: Mapping[str, tuple[Query, ...]] = field(default_factory=dict)
    portability: Mapping[str, tuple[Query, ...]] = field(default_factory=dict)
    multi_hop: tuple[Query, ...] = ()
    domain: str | None = None
    generation: tuple[str, ...] = ()
    attribute: tuple[Query, ...] = ()
    target_id: str | None = None

    def __post_init__(self) -> None:
        if not self.requests:
            raise ValueError(f"record {self.id!r} has no edit request")

    @property
    def request(self) -> EditRequest:
        """The first edit, for the sets in which a record is one edit."""
        return self.requests[0]

    @property
    def single(self) -> bool:
        """Whether it is one edit, so that its rephrases and portability queries are known to be that edit's."""
        return len(self.requests) == 1

    def to_json(self) -> str:
        return json.dumps(asdict(self, dict_factory=_given), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> "EditRecord":
        raw: dict[str, Any] = json.loads(text)
        return cls(
            id=raw["id"],
            requests=tuple(EditRequest(**r) for r in raw["requests"]),
            rephrases=_queries(raw["rephrases"]),
            locality={kind: _queries(qs) for kind, qs in raw["locality"].items()},
            portability={kind: _queries(qs) for kind, qs in raw["portability"].items()},
            multi_hop=_queries(raw["multi_hop"]),
            domain=raw["domain"],
            generation=tuple(raw.get("generation", ())),
            attribute=_queries(raw.get("attribute", [])),
            target_id=raw.get("target_id"),
        )


def _queries(raw: list[dict[str, Any]]) -> tuple[Query, ...]:
    return tuple(
        Query(
            q["prompt"],
            tuple(q["answers"]),
            tuple(EditRequest(**r) for r in q.get("hops", ())),
            tuple(q.get("criteria", ())),
            _queries(q.get("conditions", [])),
        )
        for q in raw
    )


_RARE = ("fact", "hops", "criteria", "conditions", "generation", "attribute", "target_id")


def _given(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Few sources have these fields: records of the others are written without them."""
    return {name: value for name, value in fields if value or name not in _RARE}


def join(prompt: str, target: str) -> str:
    """Prompt and target as one text, by the leading-space rule.

    One space stands between them, unless the prompt is empty, ends in white space, or the target begins with it.
    """
    if not prompt or prompt[-1].isspace() or target[:1].isspace():
        return prompt + target
    return f"{prompt} {target}"
