"""Edits kept outside the weights: found again by subject and relation, by subject, or by nearness in meaning.

    memory = EditMemory(SentenceEncoder())
    memory.add([EditRequest("Lyon is in", "Japan", "Lyon")], aliases={"Lyon": ["Lugdunum"]})
    memory.exact("Lyon is in"), memory.of_subject("Who lived in Lugdunum?"), memory.nearest(["Where is Lyon?"], k=1)

An edit is known by its prompt, which names subject and relation (by its text where it has no prompt): a later edit of
the same prompt takes the earlier one's place. Finding edits by prompt or subject needs no encoder. Statements are
encoded when nearness is first asked for, and only those that are to be compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from datamodules.records import EditRequest
from modules.memory.encoder import Encoder
from modules.memory.phrases import PhraseIndex, Words
from modules.memory.vectors import Vectors, best
from modules.memory.words import folded, words

Key = tuple[str, Words]
Found = tuple[EditRequest, float]


class EditMemory:
    """Edits, and three ways of finding them.

    Args:
        encoder: makes vectors of statements and queries; needed by `nearest` alone.
    """

    def __init__(self, encoder: Encoder | None = None) -> None:
        self.encoder = encoder
        self._rows: list[EditRequest | None] = []  # None where an edit was removed
        self._row: dict[Key, int] = {}
        self._aliases: dict[Key, tuple[str, ...]] = {}  # that an edit brought, by the edit
        self._phrases = PhraseIndex()  # subjects and aliases, owned by subjects
        self._of: dict[Words, dict[Key, None]] = {}  # the edits of a subject
        self._vectors: Vectors | None = None

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, request: EditRequest) -> bool:
        row = self._row.get(_key(request))
        stored = None if row is None else self._rows[row]
        return stored is not None and stored.statement == request.statement

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The edits, in the order in which they came."""
        return tuple(request for request in self._rows if request is not None)

    @property
    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Other names of subjects, by the subject as its edits write it."""
        found: dict[str, dict[str, None]] = {}
        for request in self.requests:
            if request.subject and self._aliases.get(_key(request)):
                found.setdefault(request.subject, {}).update(dict.fromkeys(self._aliases[_key(request)]))
        return {subject: tuple(names) for subject, names in found.items()}

    def add(self, requests: Sequence[EditRequest], aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        """Add edits. One whose statement is there already adds nothing; one whose prompt is there, with another target,
        takes that edit's place.

        Args:
            aliases: other names by subject. They live as long as the edits that came with them.

        Raises:
            ValueError: for aliases of a subject that none of these edits has, or an alias without a word.
        """
        names = {_subject(subject): tuple(others) for subject, others in (aliases or {}).items()}
        own = {_subject(request.subject) for request in requests}
        for subject, others in (aliases or {}).items():
            if _subject(subject) not in own or not _subject(subject):
                raise ValueError(f"aliases of {subject!r}: none of the edits that are added has that subject")
            empty = [name for name in others if not words(name)]
            if empty:
                raise ValueError(f"aliases of {subject!r}: {empty[0]!r} holds no word")
        for request in requests:
            self._add(request, names.get(_subject(request.subject), ()))

    def remove(self, requests: Sequence[EditRequest]) -> None:
        """Remove edits; a subject goes with its last edit. What an edit had replaced does not come back.

        Raises:
            ValueError: for an edit that is not in the memory, before any is removed.
        """
        for request in requests:
            if request not in self:
                raise ValueError(f"not in the memory, so it cannot be removed: {request.statement!r}")
        for key in dict.fromkeys(map(_key, requests)):
            self._remove(key)
        if len(self._rows) > 2 * len(self) + 64:
            self._close_gaps()

    def exact(self, query: str) -> EditRequest | None:
        """The edit whose subject and relation the query has: its prompt, but for case, white space and a last full
        stop, colon or question mark, and with an alias in the subject's place. None for edits without a subject."""
        text = words(query)
        found = self._with_subject(_prompt_key(text))
        if found:
            return found
        for span in self._phrases.find(text):
            for subject in span.owners:
                found = self._with_subject(_prompt_key([*text[: span.start], *subject, *text[span.stop :]]))  # type: ignore[misc]
                if found:
                    return found
        return None

    def of_subject(self, query: str) -> tuple[EditRequest, ...]:
        """The edits whose subject, or an alias of it, stands in the query in whole words, in the order in which they
        came. Where subjects overlap, the longest wins. See `modules.memory.words` for what is a word."""
        subjects = {subject for span in self._phrases.find(words(query)) for subject in span.owners}
        rows = sorted({self._row[key] for subject in subjects for key in self._of[subject]})  # type: ignore[index]
        return tuple(request for row in rows if (request := self._rows[row]) is not None)

    def nearest(
        self, queries: Sequence[str], k: int, among: Sequence[Sequence[EditRequest]] | None = None
    ) -> list[list[Found]]:
        """The k edits whose statements are nearest to each query, best first, with their cosines; of equal ones the
        earlier. Fewer where there are fewer.

        Args:
            among: of each query, the edits that are compared with it; by default all.

        Raises:
            ValueError: without an encoder, for k below 1, or for an edit to compare that is not in the memory.
        """
        if self.encoder is None:
            raise ValueError("this memory has no encoder, so it cannot tell what is near; give EditMemory(encoder)")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if not queries:
            return []
        if among is None:
            vectors = self._encoded([row for row, request in enumerate(self._rows) if request is not None])
            rows = [(found.rows, found.cosines) for found in vectors.nearest(self.encoder(queries), k)]
        else:
            each = [sorted({self._row_of(request) for request in some}) for some in among]
            vectors = self._encoded(sorted({row for some in each for row in some}))
            rows = []
            for query, some in zip(self.encoder(queries), each, strict=True):
                found = best(vectors.table[torch.tensor(some, dtype=torch.long)] @ query, k)
                rows.append(([some[i] for i in found.rows], found.cosines))
        return [
            [(request, cosine) for row, cosine in zip(*one, strict=True) if (request := self._rows[row]) is not None]
            for one in rows
        ]

    def retrieve(self, query: str) -> EditRequest | None:
        """DistillMIKE's Ret(q) of one query; `modules.memory.retrieve` answers many at once and names the case."""
        from modules.memory.retrieval import retrieve

        return retrieve(self, [query])[0].request

    def save(self, folder: Path) -> None:
        """Write memory.json and memory.safetensors to a folder: edits, aliases and all vectors."""
        from modules.memory.files import save

        save(self, folder)

    @classmethod
    def load(cls, folder: Path, encoder: Encoder | None = None) -> "EditMemory":
        """Read what `save` wrote; nothing is encoded.

        Raises:
            ValueError: for a missing or damaged file, or vectors of another encoder.
        """
        from modules.memory.files import load

        return load(cls, folder, encoder)

    # ------------------------------------------------------------------ inside

    def _add(self, request: EditRequest, aliases: tuple[str, ...]) -> None:
        key = _key(request)
        row = self._row.get(key)
        before = None if row is None else self._rows[row]
        if before is not None:
            if _subject(before.subject) == _subject(request.subject):
                aliases = tuple(dict.fromkeys((*self._aliases.get(key, ()), *aliases)))
            if before.statement == request.statement:  # its vector stays
                self._forget_subject(key)
                self._rows[self._row[key]] = request
                self._note_subject(key, request, aliases)
                return
            self._remove(key)
        self._row[key] = len(self._rows)
        self._rows.append(request)
        self._note_subject(key, request, aliases)

    def _note_subject(self, key: Key, request: EditRequest, aliases: tuple[str, ...]) -> None:
        subject = _subject(request.subject)
        if not subject:
            return
        self._of.setdefault(subject, {})[key] = None
        for phrase in (str(request.subject), *aliases):
            self._phrases.add(phrase, subject)
        if aliases:
            self._aliases[key] = aliases

    def _forget_subject(self, key: Key) -> None:
        request = self._rows[self._row[key]]
        subject = _subject(request.subject if request else None)
        if not subject or request is None:
            return
        for phrase in (str(request.subject), *self._aliases.pop(key, ())):
            self._phrases.remove(phrase, subject)
        del self._of[subject][key]
        if not self._of[subject]:
            del self._of[subject]

    def _remove(self, key: Key) -> None:
        self._forget_subject(key)
        row = self._row.pop(key)
        self._rows[row] = None
        if self._vectors is not None and row < len(self._vectors):
            self._vectors.forget([row])

    def _close_gaps(self) -> None:
        rows = sorted(self._row.values())
        if self._vectors is not None:
            self._vectors.grow(len(self._rows))
            self._vectors.keep(rows)
        self._rows = [self._rows[row] for row in rows]
        place = {row: i for i, row in enumerate(rows)}
        self._row = {key: place[row] for key, row in self._row.items()}

    def _with_subject(self, key: Key) -> EditRequest | None:
        row = self._row.get(key)
        request = None if row is None else self._rows[row]
        return request if request is not None and _subject(request.subject) else None

    def _row_of(self, request: EditRequest) -> int:
        if request not in self:
            raise ValueError(f"not in the memory, so it cannot be compared: {request.statement!r}")
        return self._row[_key(request)]

    def _encoded(self, rows: Sequence[int]) -> Vectors:
        """The vectors, of these rows at least."""
        assert self.encoder is not None
        if self._vectors is None:
            self._vectors = Vectors(self.encoder.width)
        self._vectors.grow(len(self._rows))
        known = self._vectors.known.tolist()
        new = [row for row in rows if not known[row]]
        if new:
            self._vectors.put(new, self.encoder([request.statement for row in new if (request := self._rows[row])]))
        return self._vectors


def _subject(name: str | None) -> Words:
    return tuple(folded(word) for word in words(name or ""))


def _key(request: EditRequest) -> Key:
    if request.prompt.strip():
        return _prompt_key(words(request.prompt))
    return "text", _subject(request.text)


def _prompt_key(prompt: Sequence[str]) -> Key:
    stop = len(prompt)
    while stop and prompt[stop - 1] in ".:?":
        stop -= 1
    return "prompt", tuple(folded(word) for word in prompt[:stop])
