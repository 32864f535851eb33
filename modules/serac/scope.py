"""The scope classifier: is a query about one of the edits, and about which?

SERAC (arXiv 2206.06520), section 3: the query's and each edit's vectors are compared, and the most similar edit counts
where it is similar enough. Over a memory of N edits that is one matrix product.

Q queries, N edits, d width.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.records import EditRequest
from modules.serac.encoder import EncoderConfig, TextEncoder


@dataclass
class ScopeConfig:
    """The classifier.

    Args:
        encoder: of queries and edits.
        similarity: `distance`: exp(-||a - b||²); `cosine`: exp(cos(a, b) - 1). Both are 1 for equal vectors.
        threshold: a query is in scope where its best similarity is above it.
        edit_side: what of an edit is compared: its `prompt` (released for GPT models, whose labels are cut off), or its
            `statement`, with the target (released for sequence-to-sequence models). An edit without a prompt is
            compared as its text.
    """

    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    similarity: Literal["distance", "cosine"] = "distance"
    threshold: float = 0.5
    edit_side: Literal["prompt", "statement"] = "prompt"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"scope.threshold must be between 0 and 1, got {self.threshold}")

    def text(self, request: EditRequest) -> str:
        """What of an edit is compared with queries."""
        whole = self.edit_side == "statement" or not request.prompt
        return request.statement if whole else request.prompt


class ScopeClassifier(nn.Module):
    """An encoder with what the similarity of its vectors means."""

    def __init__(self, config: ScopeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = TextEncoder(config.encoder)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The vectors of ids and mask [R, T]: [R, d]."""
        return self.encoder(ids, mask)

    def log_similarity(self, queries: Tensor, edits: Tensor) -> Tensor:
        """Of queries [Q, d] and edits [N, d]: [Q, N], at most 0."""
        with torch.autocast(queries.device.type, enabled=False):
            if self.config.similarity == "cosine":
                a, b = (nn.functional.normalize(x, dim=-1) for x in (queries, edits))
                return (a @ b.T - 1).clamp(max=0)
            squares = queries.square().sum(-1)[:, None] + edits.square().sum(-1)[None]
            return (2 * queries @ edits.T - squares).clamp(max=0)

    def nearest(self, queries: Tensor, edits: Tensor) -> tuple[Tensor, Tensor]:
        """The similarity of each query's most similar edit, and its number [Q]. Needs N of at least 1."""
        best = self.log_similarity(queries, edits).max(-1)
        return best.values.exp(), best.indices
