"""Which of many phrases stand in a text, in whole words.

A dictionary of phrases by their words, asked only at words that begin one, and only for the lengths that such phrases
have: the time of a search depends on the text and hardly on the number of phrases.

Case. "Where is lyon?" means Lyon, yet who is with friends is not in *Friends*, and us is not the US. So case makes no
difference, but for two rules: a phrase with a capital is not found where it has none, in a text that has capitals after
its first word; and a phrase of up to three letters is found in its own case alone.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from modules.memory.words import Words, fold, words

Owner = TypeVar("Owner", bound=Hashable)
_SHORT = 3


class Span(NamedTuple, Generic[Owner]):
    """Words `start` to `stop` of a text are a phrase of these owners."""

    start: int
    stop: int
    owners: tuple[Owner, ...]


@dataclass
class PhraseIndex(Generic[Owner]):
    """Phrases, each with its owners.

    Attributes:
        owners: of each phrase, by its folded words: how often an owner has it, by owner and case.
        lengths: by the first word of a phrase: how many phrases that begin with it have so many words.
    """

    owners: dict[Words, Counter[tuple[Owner, Words]]] = field(default_factory=dict)
    lengths: dict[str, Counter[int]] = field(default_factory=dict)

    def add(self, phrase: str, owner: Owner) -> None:
        """One more use of a phrase by an owner. A phrase without any word is never found."""
        case = words(phrase)
        key = fold(case)
        if not key:
            return
        if key not in self.owners:
            self.owners[key] = Counter()
            self.lengths.setdefault(key[0], Counter())[len(key)] += 1
        self.owners[key][owner, case] += 1

    def remove(self, phrase: str, owner: Owner) -> None:
        """One use less; after the last one the phrase is gone."""
        case = words(phrase)
        key = fold(case)
        if not key:
            return
        _less(self.owners[key], (owner, case))
        if not self.owners[key]:
            del self.owners[key]
            _less(self.lengths[key[0]], len(key))
            if not self.lengths[key[0]]:
                del self.lengths[key[0]]

    def find(self, text: Sequence[str]) -> list[Span[Owner]]:
        """The phrases that stand in a text, given as its words, from left to right.

        Where phrases overlap, the longest in letters wins; all of equally long ones stay.
        """
        keys = fold(text)
        cased = _has_capital(text[1:])
        spans: list[Span[Owner]] = []
        for start, first in enumerate(keys):
            for length in self.lengths.get(first, ()):
                stop = start + length
                uses = self.owners.get(keys[start:stop])  # beyond the end it is shorter, and another phrase or none
                if uses and stop <= len(keys):
                    case = tuple(text[start:stop])
                    owners = dict.fromkeys(owner for owner, own in uses if _fits(own, case, cased))
                    if owners:
                        spans.append(Span(start, stop, tuple(owners)))
        size = {(s.start, s.stop): sum(map(len, keys[s.start : s.stop])) for s in spans}
        kept: list[Span[Owner]] = []
        for span in sorted(spans, key=lambda s: -size[s.start, s.stop]):
            longer = (other for other in kept if size[other.start, other.stop] > size[span.start, span.stop])
            if not any(span.start < other.stop and other.start < span.stop for other in longer):
                kept.append(span)
        return sorted(kept, key=lambda s: (s.start, s.stop))

    def copy(self) -> "PhraseIndex[Owner]":
        return PhraseIndex(
            {key: uses.copy() for key, uses in self.owners.items()},
            {first: counts.copy() for first, counts in self.lengths.items()},
        )


def _fits(own: Words, found: Words, cased: bool) -> bool:
    """Whether a phrase's case agrees with that of its place in a text; `cased`: the text has capitals to go by."""
    if own == found:
        return True
    if sum(map(len, own)) <= _SHORT:
        return False
    return not cased or _has_capital(found) or not _has_capital(own)


def _has_capital(text: Sequence[str]) -> bool:
    return any(word != word.lower() for word in text)


def _less(counts: Counter, key: Hashable) -> None:
    counts[key] -= 1
    if not counts[key]:
        del counts[key]
