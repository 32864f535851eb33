"""IKE: the edit nearest to a query, told after demonstrations that copy, update and retain (arXiv 2305.12740).

Every query is told of some edit, whether or not it is about it: the demonstrations that retain are to save the others.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

from datamodules.records import EditRequest
from datamodules.sources import Source
from modules.memory import EditMemory, EncoderConfig
from modules.prompted import Context, PromptEditor
from modules.training_free.demonstrations import Demonstrations, Kind, demonstration, fact


@dataclass
class IKE(PromptEditor):
    """In-context editing by demonstrations of three kinds, with one edit of many.

    The paper's queries are asked with their own record's edit. With many edits in place at once each query gets the
    one whose statement is nearest to it, out of scope or not.

    Args:
        demonstrations: where training edits come from: records with rephrases and locality queries.
        copy, update, retain: how many training edits are shown as what, in an order drawn for each edit (4, 12 and 16
            as released).
        encoder: finds the edit of a query, and the training edits nearest to that.
        seed: draws that order, and which rephrase or neighbour of a record is shown.
    """

    demonstrations: list[Source] = field(default_factory=lambda: [Source("facts")])
    copy: int = 4
    update: int = 12
    retain: int = 16
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    seed: int = 0

    name: ClassVar[str] = "ike"

    def __post_init__(self) -> None:
        if min(self.copy, self.update, self.retain) < 0:
            raise ValueError(
                f"ike: copy, update and retain must not be negative, got {self.copy}, {self.update}, {self.retain}"
            )

    @property
    def kinds(self) -> list[Kind]:
        """As what the training edits of one edit are shown."""
        return ["copy"] * self.copy + ["update"] * self.update + ["retain"] * self.retain

    @cached_property
    def corpus(self) -> Demonstrations:
        """The training edits, read and encoded when they are first needed."""
        return Demonstrations(self.demonstrations, self.sentences, list(dict.fromkeys(self.kinds)), self.seed)

    def tell(self, memory: EditMemory, prompts: Sequence[str]) -> list[Context | None]:
        """See `PromptEditor.tell`."""
        found = [near[0][0] for near in memory.nearest(prompts, 1)]
        edits = list(dict.fromkeys(found))
        shown = self.corpus.of(edits, [self._plan(edit) for edit in edits], memory) if self.kinds else [()] * len(edits)
        about = {
            edit: Context(f"{demonstration(fact(edit), fact(edit))}New Fact: {fact(edit)}\nPrompt: ", parts)
            for edit, parts in zip(edits, shown, strict=True)
        }
        return [about[edit] for edit in found]

    def _plan(self, edit: EditRequest) -> list[tuple[Kind]]:
        kinds = self.kinds
        random.Random(f"{self.seed}/{edit.statement}").shuffle(kinds)
        return [(kind,) for kind in kinds]
