"""MQuAKE's demonstrations: what stands before a question, so that a base model answers it in the right form."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from hashlib import sha256

from modules.asked import Asked
from modules.protocols.text import first_line

# Of this project's own making, for when MQuAKE's files are not at hand.
_MULTI_HOP = """\
Q: What is the capital of the country where the Eiffel Tower stands? A: Paris
Q: Who wrote the novel that the film "Blade Runner" is based on? A: Philip K. Dick
Q: Which continent is the country with the capital Nairobi part of? A: Africa
Q: In which country is the company that makes the Toyota Corolla based? A: Japan
Q: What is the official language of the country where Pelé was born? A: Portuguese
Q: Who founded the company that develops Windows? A: Bill Gates
Q: In which city was the composer of "The Magic Flute" born? A: Salzburg
Q: What is the currency of the country whose capital is Bern? A: Swiss franc"""
_SINGLE_HOP = """\
Q: Which country is Kyoto located in? A: Japan
Q: Who is the author of Hamlet? A: William Shakespeare
Q: What is the capital of Peru? A: Lima
Q: Which sport is Roger Federer associated with? A: tennis
Q: Who founded Apple? A: Steve Jobs
Q: What is the official language of Brazil? A: Portuguese
Q: Which continent is Kenya located in? A: Africa
Q: Who performed Thriller? A: Michael Jackson"""
_THOUGHTS, _ANSWER = "Thoughts:", "Answer:"


@dataclass(frozen=True)
class FewShot:
    """Demonstrations, one "Q: ... A: ..." a line.

    Args:
        multi_hop: before multi-hop questions: MQuAKE's multihop-prompts.txt, or multihop-cot-prompts.txt, which thinks
            before it answers ("Question: ...", "Thoughts: ...", "Answer: ...").
        single_hop: before single-hop questions whose relation has none of its own.
        relations: by relation, before its single-hop questions: MQuAKE's rel-prompts.json.
    """

    multi_hop: str = _MULTI_HOP
    single_hop: str = _SINGLE_HOP
    relations: Mapping[str, str] = field(default_factory=dict)

    @property
    def thinks(self) -> bool:
        """Whether answers come after a chain of thought."""
        return _THOUGHTS in self.multi_hop

    @property
    def digest(self) -> str:
        """A short hash of all demonstrations, by which two results tell whether theirs are the same."""
        return sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def ask(self, question: str) -> Asked:
        """The prompt of a multi-hop question."""
        if self.thinks:
            return Asked(f"{self.multi_hop.rstrip()}\n\n", f"Question: {question}\n{_THOUGHTS}", question)
        return _after(self.multi_hop, question)

    def ask_hop(self, question: str) -> Asked:
        """The prompt of a single-hop question."""
        return _after(self.relations.get(self.relation(question) or "", self.single_hop), question)

    def relation(self, question: str) -> str | None:
        """The relation that a question asks for, or None.

        MQuAKE's questions are worded by relation, so a question and its demonstrations begin and end alike.
        """
        fitting = {
            relation: len(before) + len(after)
            for relation, (before, after) in self._frames.items()
            if len(question) > len(before) + len(after) and question.startswith(before) and question.endswith(after)
        }
        return max(fitting, key=lambda relation: fitting[relation], default=None)

    @cached_property
    def _frames(self) -> dict[str, tuple[str, str]]:
        return {relation: _frame(demonstrations) for relation, demonstrations in self.relations.items()}

    def answer(self, text: str) -> str:
        """What a continuation of a prompt answers: its first line, or with thoughts the line of the answer."""
        if self.thinks:
            _, found, text = text.partition(_ANSWER)
            if not found:
                return ""
        return first_line(text)


def _after(demonstrations: str, question: str) -> Asked:
    return Asked(f"{demonstrations.rstrip()}\n", f"Q: {question} A:", question)


def _frame(demonstrations: str) -> tuple[str, str]:
    """How all the questions of a relation begin and end."""
    questions = [line.partition(" A:")[0].removeprefix("Q:").strip() for line in demonstrations.splitlines() if line]
    before = _shared(questions)
    return before, _shared([question[len(before) :][::-1] for question in questions])[::-1]


def _shared(texts: Sequence[str]) -> str:
    """How all of some texts begin."""
    first, last = min(texts, default=""), max(texts, default="")
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
