"""Which of many phrases stand in a text, in whole words.

A dictionary of phrases by their words, asked only at words that begin one, and only for the lengths that such phrases
have: the time of a search depends on the text and hardly on the number of phrases.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from modules.memory.words import folded, words

Words = tuple[str, ...]


class Span(NamedTuple):
    """Words `start` to `stop` of a text are a phrase of these owners."""

    start: int
    stop: int
    owners: tuple[Hashable, ...]


@dataclass
class PhraseIndex:
    """Phrases, each with its owners.

    Attributes:
        owners: of each phrase, by its folded words: how often each owner has it in each case.
        lengths: by the first word of a phrase: how many phrases that begin with it have so many words.
    """

    owners: dict[Words, Counter[tuple[Hashable, Words]]] = field(default_factory=dict)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, phrase: str, owner: Hashable) -> None:
        """One more use of a phrase by an owner; a phrase without any word is never found."""
        case, key = _phrase(phrase)
        if not key:
            return
        if key not in self.owners:
            self.owners[key] = Counter()
            self.lengths.setdefault(key[0], Counter())[len(key)] += 1
        self.owners[key][owner, case] += 1

    def remove(self, phrase: str, owner: Hashable) -> None:
        """One use less; after the last one the phrase is gone."""
        case, key = _phrase(phrase)
        if not key:
            return
        _less(self.owners[key], (owner, case))
        if not self.owners[key]:
            del self.owners[key]
            _less(self.lengths[key[0]], len(key))
            if not self.lengths[key[0]]:
                del self.lengths[key[0]]

    def find(self, text: Sequence[str]) -> list[Span]:
        """The phrases that stand in a text, given as its words, from left to right.

        Where phrases overlap, the longest wins; all of equally long ones stay.
        """
        keys = [folded(word) for word in text]
        spans: list[Span] = []
        for start, first in enumerate(keys):
            for length in self.lengths.get(first, ()):
                stop = start + length
                uses = self.owners.get(tuple(keys[start:stop])) if stop <= len(keys) else None
                if uses:
                    case = tuple(text[start:stop])
                    owners = dict.fromkeys(owner for owner, own in uses if _same_case(own, case))
                    if owners:
                        spans.append(Span(start, stop, tuple(owners)))
        size = {span: sum(map(len, keys[span.start : span.stop])) for span in spans}
        kept: list[Span] = []
        for span in sorted(spans, key=lambda s: -size[s]):
            if not any(_overlap(span, other) and size[other] > size[span] for other in kept):
                kept.append(span)
        return sorted(kept)


def _phrase(phrase: str) -> tuple[Words, Words]:
    case = tuple(words(phrase))
    return case, tuple(folded(word) for word in case)


def _same_case(phrase: Words, text: Words) -> bool:
    """Case makes no difference, but for a very short phrase: US is not us, It not it, WHO not who."""
    return phrase == text or sum(map(len, phrase)) > 3


def _overlap(a: Span, b: Span) -> bool:
    return a.start < b.stop and b.start < a.stop


def _less(counts: Counter, key: Hashable) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
