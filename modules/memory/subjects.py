"""The edits of each subject, found by its name or an alias of it in a text."""

from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

from modules.memory.phrases import PhraseIndex, Span
from modules.memory.words import Words, fold, words

Edit = TypeVar("Edit", bound=Hashable)


def subject_of(name: str | None) -> Words:
    """By what a subject is known; empty where there is none, or no word in it."""
    return fold(words(name or ""))


class SubjectIndex(Generic[Edit]):
    """Edits by subject. A name lives as long as one of the edits that came with it, a subject as long as its edits."""

    def __init__(self) -> None:
        self._names = PhraseIndex[Words]()  # owned by subjects
        self._edits: dict[Words, dict[Edit, None]] = {}

    def add(self, edit: Edit, subject: str | None, aliases: Sequence[str] = ()) -> None:
        """Note an edit; nothing where it has no subject."""
        key = subject_of(subject)
        if key:
            self._edits.setdefault(key, {})[edit] = None
            for name in (str(subject), *aliases):
                self._names.add(name, key)

    def remove(self, edit: Edit, subject: str | None, aliases: Sequence[str] = ()) -> None:
        """Undo `add` of the same."""
        key = subject_of(subject)
        if key:
            for name in (str(subject), *aliases):
                self._names.remove(name, key)
            del self._edits[key][edit]
            if not self._edits[key]:
                del self._edits[key]

    def spans(self, text: Words) -> list[Span[Words]]:
        """Where subjects are named in a text, given as its words; the owners are subjects."""
        return self._names.find(text)

    def edits(self, text: Words) -> list[Edit]:
        """The edits of all subjects that are named in a text, each once."""
        named = {subject for span in self.spans(text) for subject in span.owners}
        return [edit for subject in named for edit in self._edits[subject]]

    def copy(self) -> "SubjectIndex[Edit]":
        other = SubjectIndex[Edit]()
        other._names = self._names.copy()
        other._edits = {subject: dict(edits) for subject, edits in self._edits.items()}
        return other
