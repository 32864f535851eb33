"""RAG: the edits nearest to a query before it (the baseline of InComeS, arXiv 2505.22156, appendix C.1)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from modules.memory import EditMemory, EncoderConfig
from modules.prompted import Context, PromptEditor


@dataclass
class RAG(PromptEditor):
    """The statements of the nearest edits as text before a query, the nearest last; with one edit it is ICL.

    Args:
        top_k: how many (10 in the paper; their order is not given).
        encoder: the retriever (`BAAI/bge-base-en-v1.5` in the paper).
    """

    top_k: int = 10
    encoder: EncoderConfig = field(default_factory=EncoderConfig)

    name: ClassVar[str] = "rag"

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise ValueError(f"rag: top_k must be at least 1, got {self.top_k}")

    def tell(self, memory: EditMemory, prompts: Sequence[str]) -> list[Context | None]:
        """See `PromptEditor.tell`."""
        told: list[Context | None] = []
        for near in memory.nearest(prompts, self.top_k):
            first, *others = (edit.statement for edit, _ in near)
            told.append(Context(first + "\n", tuple(f"{statement} " for statement in reversed(others))))
        return told
