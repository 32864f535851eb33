"""MIKE: the edit that a query asks about, told after demonstrations of other edits; other queries are left alone.

Source: Qiao et al. 2024, DistillMIKE, section 4.1 and appendices C, E and G.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from datamodules.records import EditRequest
from datamodules.sources import Source
from modules.memory import EditMemory, EncoderConfig, retrieve
from modules.prompted import Context, PromptEditor
from modules.training_free.demonstrations import Demonstrations, Kind, demonstration, fact
from modules.training_free.subject import require_subjects


@dataclass
class MIKE(PromptEditor):
    """Selective retrieval, and in-context editing for what is in scope alone.

    A query is in scope where it names the subject of an edit (see `modules.memory.retrieve`); all others are answered
    by the unedited model. Before a query in scope stand the training edits nearest to the retrieved one, the nearest
    last, each with a rephrase; then the edit itself with its own prompt. None of them is about an edited subject.

    Args:
        demonstrations: where training edits come from: records with rephrases.
        k: how many training edits are shown (12 in the paper, which has 0, 4 and 8 as well).
        scope_aware: show them as updates alone; else each as copy, update and retain (the paper's filter g, left out).
        encoder: finds demonstrations, and the edit among several of one subject.
        seed: draws the rephrases that are shown.
    """

    demonstrations: list[Source] = field(default_factory=lambda: [Source("facts")])
    k: int = 12
    scope_aware: bool = True
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    seed: int = 0

    name: ClassVar[str] = "mike"

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ValueError(f"mike: k must not be negative, got {self.k}")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """As what a training edit is shown."""
        return ("update",) if self.scope_aware else ("copy", "update", "retain")

    @cached_property
    def corpus(self) -> Demonstrations:
        """The training edits, read and encoded when they are first needed."""
        return Demonstrations(self.demonstrations, self.sentences, self.kinds, self.seed)

    def check(self, requests: Sequence[EditRequest]) -> None:
        """Refuse edits without prompt, target or subject, which no query would find.

        Raises:
            ValueError: naming the edit.
        """
        require_subjects(self.name, requests)

    def tell(self, memory: EditMemory, prompts: Sequence[str]) -> list[Context | None]:
        """See `PromptEditor.tell`."""
        found = [retrieved.request if retrieved else None for retrieved in retrieve(memory, prompts)]
        edits = [edit for edit in dict.fromkeys(found) if edit is not None]
        shown = self.corpus.of(edits, [[self.kinds] * self.k] * len(edits), memory) if self.k else [()] * len(edits)
        about = {
            edit: Context(demonstration(fact(edit), fact(edit)) + "Prompt: ", parts)
            for edit, parts in zip(edits, shown, strict=True)
        }
        return [None if edit is None else about[edit] for edit in found]
