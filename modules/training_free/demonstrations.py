"""Demonstrations for in-context editing: training edits, each shown as a fact and a prompt with its answer.

A training edit is shown as one of three kinds (IKE, arXiv 2305.12740): `copy`, where the prompt is the fact's own;
`update`, a rephrase, whose answer is the new one too; and `retain`, a neighbour, whose answer stays as it was.

M training edits, n edits, d width of the encoder.
"""

import json
import random
from collections.abc import Sequence
from hashlib import sha256
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest, join
from datamodules.schedule import stable_hash
from datamodules.sources import Source, load
from modules.kept_tensors import folder, read, write
from modules.memory import EditMemory, Encoder
from modules.memory.subjects import subject_of
from modules.memory.words import Words

Kind = Literal["copy", "update", "retain"]
VERSION = 1  # of what is encoded: a change makes old files unknown
CHUNK = 1024  # records, or texts, at a time
SPARE = 64  # training edits beyond those wanted, for the ones that cannot be shown


def fact(request: EditRequest) -> str:
    """An edit as one text without a full stop at its end: the prompt with its target, or the free text."""
    return request.text or join(request.prompt, request.target)


def demonstration(fact: str, answered: str) -> str:
    """A fact, and a prompt with its answer."""
    return f"New Fact: {fact}\nPrompt: {answered}\n\n"


class Demonstrations:
    """Training edits, found by the cosine of their statements with an edit's (DistillMIKE, appendix C).

    Args:
        sources: records of one edit each. Those that have none of the queries that `kinds` need are left out.
        seed: draws which rephrase or neighbour of a record is shown: one for each record, always the same.

    Raises:
        ValueError: where no record is left; it names the sources.
    """

    def __init__(self, sources: Sequence[Source], encoder: Encoder, kinds: Sequence[Kind], seed: int = 0) -> None:
        self.encoder, self.seed = encoder, seed
        self.dataset = load(sources)
        self.places: list[int] = []  # of a training edit among the records
        self.of_subject: dict[Words, list[int]] = {}  # training edits by subject
        statements: list[str] = []
        for at in range(0, len(self.dataset), CHUNK):
            some = range(at, min(at + CHUNK, len(self.dataset)))
            for place, record in zip(some, self.dataset.records(some), strict=True):
                request = record.request
                if len(record.requests) > 1 or not request.prompt or not all(_prompts(record, kind) for kind in kinds):
                    continue
                if request.subject:
                    self.of_subject.setdefault(subject_of(request.subject), []).append(len(self.places))
                self.places.append(place)
                statements.append(request.statement)
        if not self.places:
            needed = {"copy": "a prompt and a target", "update": "rephrases", "retain": "locality queries"}
            raise ValueError(
                f"no record of the demonstrations ({', '.join(s.name for s in sources)}) is one edit with "
                f"{' and '.join(needed[kind] for kind in dict.fromkeys(kinds))}; name other sources in `demonstrations`"
            )
        self.vectors = encoded(encoder, statements, "demonstrations")  # [M, d]

    def __len__(self) -> int:
        return len(self.places)

    def of(
        self, edits: Sequence[EditRequest], plans: Sequence[Sequence[Sequence[Kind]]], memory: EditMemory
    ) -> list[tuple[str, ...]]:
        """The demonstrations of each edit, the nearest last. None is about a subject that the memory edits.

        Args:
            plans: of each edit, the kinds as which the nearest training edit is shown, the second nearest, and so on.
        """
        subjects = {subject_of(request.subject) for request in memory.requests if request.subject}
        blocked = [i for subject in subjects for i in self.of_subject.get(subject, ())]
        near = self._nearest([e.statement for e in edits], max(map(len, plans), default=0) + SPARE, blocked)
        found = []
        for candidates, plan in zip(near, plans, strict=True):
            records = (self.dataset.record(self.places[i]) for i in candidates)
            shown: list[list[str]] = []
            for kinds in plan:
                shown += islice((texts for r in records if (texts := self._show(r, kinds, memory))), 1)
            found.append(tuple(text for texts in reversed(shown) for text in texts))
        return found

    def _show(self, record: EditRecord, kinds: Sequence[Kind], memory: EditMemory) -> list[str]:
        """The record as demonstrations of these kinds; none where they would name a subject that the memory edits."""
        draw = random.Random(stable_hash("demonstration", self.seed, record.id))
        shown = []
        for kind in kinds:
            mine = [(prompt, answer) for prompt, answer in _prompts(record, kind) if not memory.of_subject(prompt)]
            if not mine or memory.of_subject(record.request.prompt):
                return []
            shown.append(demonstration(fact(record.request), join(*draw.choice(mine))))
        return shown

    def _nearest(self, statements: Sequence[str], k: int, blocked: list[int]) -> list[list[int]]:
        k = min(k, len(self.places) - len(blocked))
        if k < 1 or not statements:
            return [[] for _ in statements]
        found: list[list[int]] = []
        for queries in self.encoder(list(statements)).split(256):  # never [all edits, M]
            cosine = queries @ self.vectors.T
            cosine[:, blocked] = -torch.inf
            found += cosine.topk(k).indices.tolist()
        return found


def encoded(encoder: Encoder, texts: Sequence[str], what: str) -> Tensor:
    """Vectors of texts [M, d], from the disk where they were made before, else made with a progress bar and kept there.

    Files are in the folder that the environment variable PALIMPSEST_CACHE names, or in ~/.cache/palimpsest, under a
    name made of the encoder's and the texts.

    Raises:
        ValueError: for a file that cannot be read.
    """
    digest = sha256(json.dumps([VERSION, encoder.name, list(texts)]).encode()).hexdigest()[:20]
    file = folder() / f"{what}-{digest}.safetensors"
    if not file.is_file():
        from tqdm.auto import tqdm

        with tqdm(total=len(texts), desc=what, leave=False) as bar:
            parts = []
            for at in range(0, len(texts), CHUNK):
                parts.append(encoder(texts[at : at + CHUNK]))
                bar.update(len(parts[-1]))
        write(file, {"vectors": torch.cat(parts)}, {"encoder": encoder.name, "texts": str(len(texts))})
    return read(file, ["vectors"])[0]["vectors"]


def _prompts(record: EditRecord, kind: Kind) -> list[tuple[str, str]]:
    """Prompts with their answers, as which a record can be shown."""
    if kind == "copy":
        return [(record.request.prompt, record.request.target)]
    queries = record.rephrases if kind == "update" else [q for qs in record.locality.values() for q in qs]
    return [(query.prompt, query.target) for query in queries if query.prompt]
