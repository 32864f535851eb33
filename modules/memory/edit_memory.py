"""Edits kept outside the weights: found again by subject and relation, by subject, or by nearness in meaning.

    memory = EditMemory(SentenceEncoder())
    memory.add([EditRequest("Lyon is in", "Japan", "Lyon")], aliases={"Lyon": ["Lugdunum"]})
    memory.exact("Lyon is in"), memory.of_subject("Who lived in Lugdunum?"), memory.nearest(["Where is Lyon?"], k=1)

An edit is known by its prompt, which names subject and relation (by its text where it has no prompt): a later edit of
the same prompt takes the earlier one's place. Finding edits by prompt or subject needs no encoder. Statements are
encoded when nearness is first asked for, and only those that are compared.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from datamodules.records import EditRequest
from modules.memory import files
from modules.memory.encoder import Encoder
from modules.memory.files import Entry
from modules.memory.retrieval import retrieve
from modules.memory.subjects import SubjectIndex, subject_of
from modules.memory.vectors import Vectors
from modules.memory.words import Words, fold, words

Key = tuple[str, Words]


class EditMemory:
    """Edits, and three ways of finding them.

    Args:
        encoder: makes vectors of statements and queries; needed by `nearest` alone.
    """

    def __init__(self, encoder: Encoder | None = None) -> None:
        self.encoder = encoder
        self._entries: list[Entry | None] = []  # by row; None where an edit was removed
        self._row: dict[Key, int] = {}
        self._subjects = SubjectIndex[Key]()
        self._vectors: Vectors | None = None

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, request: EditRequest) -> bool:
        return self._find(request) is not None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The edits with the aliases that came with each, in the order in which they came."""
        return tuple(entry for entry in self._entries if entry is not None)

    @property
    def requests(self) -> tuple[EditRequest, ...]:
        """The edits, in the order in which they came."""
        return tuple(entry.request for entry in self.entries)

    def vectors(self) -> Tensor:
        """Of all statements, [edits, d] in the order of `requests`; those that are not known yet are encoded.

        Raises:
            ValueError: without an encoder.
        """
        return self._encoded().table[torch.tensor(sorted(self._row.values()), dtype=torch.long)]

    def add(self, requests: Sequence[EditRequest], aliases: Mapping[str, Sequence[str]] | None = None) -> None:
        """Add edits. One whose statement is there already adds nothing new; one whose prompt is there with another
        target takes that edit's place.

        Args:
            aliases: other names by subject. They live as long as the edits they came with.

        Raises:
            ValueError: for aliases of a subject that none of these edits has, or an alias without a word.
        """
        others = {subject_of(subject): tuple(names) for subject, names in (aliases or {}).items()}
        if aliases:
            self._check(aliases, {subject_of(request.subject) for request in requests})
        for request in requests:
            self._add(request, others.get(subject_of(request.subject), ()) if others else ())

    def remove(self, requests: Sequence[EditRequest]) -> None:
        """Remove edits; a subject goes with its last edit. What an edit had replaced does not come back.

        Raises:
            ValueError: for an edit that is not in the memory, before any is removed.
        """
        rows = [self._row_of(request) for request in requests]
        for row in dict.fromkeys(rows):
            self._remove(row)
        if len(self._entries) > 2 * len(self) + 64:
            self._close_gaps()

    def exact(self, query: str) -> EditRequest | None:
        """The edit whose subject and relation the query has: its prompt, but for case, white space and a last full
        stop, colon or question mark, and with an alias in the subject's place. None for edits without a subject."""
        text = words(query)
        spans = self._subjects.spans(text)
        named = [(*text[: span.start], *subject, *text[span.stop :]) for span in spans for subject in span.owners]
        for prompt in (text, *named):
            row = self._row.get(_prompt_key(prompt))
            entry = None if row is None else self._entries[row]
            if entry and subject_of(entry.request.subject):
                return entry.request
        return None

    def of_subject(self, query: str) -> tuple[EditRequest, ...]:
        """The edits whose subject, or an alias of it, stands in the query in whole words, in the order in which they
        came. Where subjects overlap, the longest wins. See `words` and `phrases` for what counts as the same."""
        rows = sorted(self._row[key] for key in self._subjects.edits(words(query)))
        return tuple(entry.request for row in rows if (entry := self._entries[row]))

    def nearest(
        self, queries: Sequence[str], k: int, among: Sequence[Sequence[EditRequest]] | None = None
    ) -> list[list[tuple[EditRequest, float]]]:
        """The k edits whose statements are nearest to each query, best first, with their cosines; of equal ones the
        earlier. Fewer where there are fewer.

        Args:
            among: of each query, the edits that are compared with it; by default all.

        Raises:
            ValueError: without an encoder, for k below 1, or for an edit to compare that is not in the memory.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if among is None:
            found = self._encoded().nearest(self._encode(queries), k)
        else:
            each = [sorted({self._row_of(request) for request in some}) for some in among]
            vectors = self._encoded(sorted({row for rows in each for row in rows}))
            asked = zip(self._encode(queries), each, strict=True)
            found = [vectors.nearest_among(query, k, rows) for query, rows in asked]
        return [
            [(entry.request, cosine) for row, cosine in zip(*near, strict=True) if (entry := self._entries[row])]
            for near in found
        ]

    def retrieve(self, query: str) -> EditRequest | None:
        """DistillMIKE's Ret(q) of one query; `modules.memory.retrieve` answers many at once and names the case."""
        return retrieve(self, [query])[0].request

    def copy(self) -> "EditMemory":
        """A memory of its own with the same edits, vectors and encoder."""
        other = EditMemory(self.encoder)
        other._entries, other._row = list(self._entries), dict(self._row)
        other._subjects = self._subjects.copy()
        other._vectors = self._vectors.copy() if self._vectors else None
        return other

    def save(self, folder: Path) -> None:
        """Write memory.json and memory.safetensors to a folder: edits and aliases, and the vectors of all statements.
        Without an encoder there are no vectors."""
        vectors = self.vectors() if self.encoder else None
        files.save(folder, files.Saved(list(self.entries), self.encoder.name if self.encoder else None, vectors))

    @classmethod
    def load(cls, folder: Path, encoder: Encoder | None = None) -> "EditMemory":
        """Read what `save` wrote; nothing is encoded.

        Raises:
            ValueError: for a missing or damaged file, or vectors of another encoder.
        """
        saved = files.load(folder)
        if encoder and saved.encoder not in (None, encoder.name):
            raise ValueError(
                f"{folder} holds vectors of the encoder {saved.encoder!r}, not of {encoder.name!r}; give that encoder"
            )
        memory = cls(encoder)
        for entry in saved.entries:
            memory._add(*entry)
        if len(memory) != len(saved.entries):
            raise ValueError(f"{folder / 'memory.json'} holds an edit twice; save the memory again")
        if encoder and saved.vectors is not None:
            memory._vectors = Vectors(saved.vectors.shape[1])
            memory._vectors.grow(len(memory))
            memory._vectors.put(range(len(memory)), saved.vectors)
        return memory

    # ------------------------------------------------------------------ inside

    @staticmethod
    def _check(aliases: Mapping[str, Sequence[str]], subjects: set[Words]) -> None:
        for subject, names in aliases.items():
            if not subject_of(subject) or subject_of(subject) not in subjects:
                raise ValueError(f"aliases of {subject!r}: none of the edits that are added has that subject")
            for name in names:
                if not words(name):
                    raise ValueError(f"aliases of {subject!r}: {name!r} holds no word")

    def _find(self, request: EditRequest) -> int | None:
        row = self._row.get(_key(request))
        entry = None if row is None else self._entries[row]
        return row if entry and entry.request.statement == request.statement else None

    def _row_of(self, request: EditRequest) -> int:
        row = self._find(request)
        if row is None:
            raise ValueError(f"not in the memory: {request.statement!r}")
        return row

    def _add(self, request: EditRequest, aliases: tuple[str, ...]) -> None:
        key = _key(request)
        row = self._row.setdefault(key, len(self._entries))
        if row == len(self._entries):
            self._entries.append(None)
        before = self._entries[row]
        if before is not None:
            if subject_of(before.request.subject) == subject_of(request.subject):
                aliases = tuple(dict.fromkeys((*before.aliases, *aliases)))
            self._unlink(key, before, forget=before.request.statement != request.statement)
        self._entries[row] = Entry(request, aliases)
        self._subjects.add(key, request.subject, aliases)

    def _remove(self, row: int) -> None:
        entry = self._entries[row]
        if entry is not None:
            key = _key(entry.request)
            self._unlink(key, entry, forget=True)
            self._entries[row] = None
            del self._row[key]

    def _unlink(self, key: Key, entry: Entry, forget: bool) -> None:
        self._subjects.remove(key, entry.request.subject, entry.aliases)
        if forget and self._vectors is not None and self._row[key] < len(self._vectors):
            self._vectors.forget([self._row[key]])

    def _close_gaps(self) -> None:
        rows = sorted(self._row.values())
        if self._vectors is not None:
            self._vectors.grow(len(self._entries))
            self._vectors.keep(rows)
        self._entries = [self._entries[row] for row in rows]
        place = {row: i for i, row in enumerate(rows)}
        self._row = {key: place[row] for key, row in self._row.items()}

    def _encode(self, texts: Sequence[str]) -> Tensor:
        if self.encoder is None:
            raise ValueError("this memory has no encoder, so it cannot tell what is near; give EditMemory(encoder)")
        return self.encoder(texts)

    def _encoded(self, rows: Sequence[int] | None = None) -> Vectors:
        """The vectors, of these rows at least; by default of all edits."""
        if self._vectors is None:
            self._vectors = Vectors(self._encode([]).shape[1])
        vectors = self._vectors
        vectors.grow(len(self._entries))
        new = vectors.unknown() if rows is None else [row for row in rows if not vectors.known[row]]
        statements = {row: entry.request.statement for row in new if (entry := self._entries[row])}
        if statements:
            vectors.put(list(statements), self._encode(list(statements.values())))
        return vectors


def _key(request: EditRequest) -> Key:
    if request.prompt.strip():
        return _prompt_key(words(request.prompt))
    return "text", fold(words(request.text or ""))


def _prompt_key(prompt: Sequence[str]) -> Key:
    stop = len(prompt)
    while stop > 1 and prompt[stop - 1] in ".:?":
        stop -= 1
    return "prompt", fold(prompt[:stop])
