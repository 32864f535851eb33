"""Contexts in which a prompt is read: bare, and after a few words that the model itself came up with.

Drawn once for a Backbone object and kept there, from a generator of their own: the same model, settings and seed give
the same contexts, whatever was drawn elsewhere.

R rows, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.tokens import encode, pad, pad_id
from modules.backbone import Backbone


@dataclass
class Contexts:
    """Which contexts are drawn.

    Args:
        counts: how many contexts of how many tokens. ROME: ten of 5 and ten of 10; MEMIT: five of 10.
        starts: what they begin with, in turn (EasyEdit's words); "" is the model's own beginning of a text, with which
            the code released with ROME starts all of them.
        top_k: each token is drawn among so many most probable ones.
        bare_share: the bare prompt's share in averaged keys; by default all contexts count the same (ROME). MEMIT's
            code gives the bare prompt one half.
        seed: of the draw.

    Raises:
        ValueError: for counts, lengths or top_k below 1, or a share outside 0 to 1.
    """

    counts: dict[int, int] = field(default_factory=lambda: {5: 10, 10: 10})
    starts: list[str] = field(default_factory=lambda: ["The", "Therefore", "Because", "I", "You"])
    top_k: int = 5
    bare_share: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if any(n < 1 or count < 1 for n, count in self.counts.items()) or self.top_k < 1 or not self.starts:
            raise ValueError(f"contexts: lengths, counts and top_k must be positive, and starts given, got {self}")
        if self.bare_share is not None and not 0 <= self.bare_share <= 1:
            raise ValueError(f"contexts.bare_share must be between 0 and 1, got {self.bare_share}")

    def draw(self, backbone: Backbone) -> list[str]:
        """Text to put in front of a prompt, the first of it "": the bare prompt."""
        known: dict[str, list[str]] = vars(backbone).setdefault("_contexts", {})
        key = str(astuple(self))
        if key not in known:
            generator = torch.Generator().manual_seed(self.seed)
            drawn = []
            for length, count in self.counts.items():
                starts = [start_ids(backbone, self.starts[i % len(self.starts)]) for i in range(count)]
                drawn += sample(backbone, starts, length, self.top_k, generator)
            texts = [str(backbone.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in drawn]
            known[key] = ["", *(f"{text}. " for text in texts)]
        return known[key]

    def weights(self, count: int) -> Tensor:
        """The share of each of `count` contexts in averaged keys [count]."""
        if self.bare_share is None or count == 1:
            return torch.full((count,), 1 / count)
        rest = (1 - self.bare_share) / (count - 1)
        return torch.tensor([self.bare_share] + [rest] * (count - 1))


def start_ids(backbone: Backbone, text: str) -> tuple[int, ...]:
    """Tokens that a drawn text begins with: those of `text`, or the model's own beginning of a text."""
    if text:
        return encode(backbone.tokenizer, text).ids
    tokenizer = backbone.tokenizer
    begin = tokenizer.bos_token_id if isinstance(tokenizer.bos_token_id, int) else pad_id(tokenizer)
    return (int(begin),)


@torch.no_grad()
def sample(
    backbone: Backbone,
    starts: Sequence[Sequence[int]],
    length: int,
    top_k: int | None,
    generator: torch.Generator,
) -> list[list[int]]:
    """Draw continuations.

    Args:
        length: of each result, its start included.
        top_k: draw among so many most probable tokens; None: among all.
        generator: on the CPU, so that all devices draw the same.

    Returns:
        Token ids of each row, R of them.
    """
    ids, mask = (t.to(backbone.device) for t in pad(starts, pad_id(backbone.tokenizer), side="left"))
    cache = DynamicCache(config=backbone.model.config)
    rows = [list(start) for start in starts]
    while any(len(row) < length for row in rows):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = backbone.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        )
        logits = backbone.logits(out.last_hidden_state[:, -1]).float().cpu()  # [R, V]
        if top_k is None:
            drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)  # [R, 1]
        else:
            best, token = logits.topk(top_k)
            drawn = token.gather(1, torch.multinomial(best.softmax(-1), 1, generator=generator))
        for row, new in zip(rows, drawn[:, 0].tolist(), strict=True):
            row.append(new)
        ids = drawn.to(backbone.device)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    return [row[:length] for row in rows]
