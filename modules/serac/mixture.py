"""The soft mixture: both models read, and their probabilities are mixed by how similar the prompt is to an edit.

As EasyEdit answers with SERAC: `(1 - s) p_base(prompt) + s p_counterfactual(edit, prompt)`, at every token; s and the
edit are of the prompt alone.

B rows, n target tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.tokens import Encoded, continuation, encode, pad, pad_id
from modules.backbone import Backbone
from modules.editor import Edited, TargetScore
from modules.serac.losses import mix


class Mixture:
    """Two models of one vocabulary that answer together.

    Args:
        contexts: of each prompt the statement of its nearest edit, and the similarity s; a prompt that has none is the
            base model's alone.
    """

    def __init__(self, backbone: Backbone, counterfactual: Backbone, contexts: Mapping[str, tuple[str, float]]) -> None:
        self.backbone = backbone
        self.counterfactual = counterfactual
        self.contexts = contexts
        self._base, self._other = Edited(backbone), Edited(counterfactual)

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        """See `Edited.score`. Where nothing stands before the target, the two models may see other tokens of it: then
        those that they share are scored."""
        scores = []
        for at in range(0, len(prompts), batch_size):
            rows = list(zip(prompts[at : at + batch_size], targets[at : at + batch_size], strict=True))
            scores += self._score(rows, top_k)
        return scores

    def _score(self, rows: Sequence[tuple[str, str]], top_k: int) -> list[TargetScore]:
        tokenizer = self.backbone.tokenizer
        plain = [encode(tokenizer, p, t) for p, t in rows]
        read = [encode(tokenizer, p, t, context=self._statement(p)) for p, t in rows]
        sizes = [_shared(a, b) for a, b in zip(plain, read, strict=True)]
        base = self._logits(self._base, plain, sizes)
        other = self._logits(self._other, read, sizes)
        found = []
        for (prompt, _), row, left, right in zip(rows, plain, base, other, strict=True):
            s = torch.full((len(left),), self._similarity(prompt), device=left.device)
            logp = mix(s, left, right.to(left.device)).cpu()  # [n, V]
            label = torch.tensor(row.ids[len(row.ids) - len(left) :], dtype=torch.long)
            k = min(top_k, logp.shape[-1])
            top = logp.topk(k).indices if k else torch.empty(len(left), 0, dtype=torch.long)
            found.append(TargetScore(logp.gather(1, label[:, None])[:, 0], logp.argmax(-1), label, top))
        return found

    def _logits(self, model: Edited, rows: Sequence[Encoded], sizes: Sequence[int]) -> list[Tensor]:
        """The logits that predict the last tokens of each row [n, V], n of `sizes`."""
        backbone = model.backbone
        ids, mask = (t.to(backbone.device) for t in pad([r.ids for r in rows], pad_id(backbone.tokenizer)))
        model._check_room(ids.shape[1])
        hidden = model.decode(ids, mask)[0].last_hidden_state
        ends = [len(row.ids) - 1 for row in rows]
        return [backbone.logits(hidden[b, end - n : end]) for b, (end, n) in enumerate(zip(ends, sizes, strict=True))]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """See `Edited.generate`."""
        texts = []
        for at in range(0, len(prompts), batch_size):
            some, tokenizer = prompts[at : at + batch_size], self.backbone.tokenizer
            new = self._generate(some, max_new_tokens)
            texts += [continuation(tokenizer, encode(tokenizer, p).ids, row) for p, row in zip(some, new, strict=True)]
        return texts

    def _generate(self, prompts: Sequence[str], max_new_tokens: int) -> list[list[int]]:
        tokenizer = self.backbone.tokenizer
        both = (
            _Running(self._base, [encode(tokenizer, p).ids for p in prompts], max_new_tokens),
            _Running(
                self._other, [encode(tokenizer, p, context=self._statement(p)).ids for p in prompts], max_new_tokens
            ),
        )
        s = torch.tensor([self._similarity(p) for p in prompts], device=self.backbone.device)
        new: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        for _ in range(max_new_tokens):
            base, other = (model.logits() for model in both)
            chosen = mix(s, base, other.to(base.device)).argmax(-1)
            for b, token in enumerate(chosen.tolist()):
                done[b] = done[b] or token == tokenizer.eos_token_id
                if not done[b]:
                    new[b].append(token)
            if all(done):
                break
            for model in both:
                model.take(chosen)
        return new

    def _statement(self, prompt: str) -> str:
        return self.contexts[prompt][0] + " " if prompt in self.contexts else ""

    def _similarity(self, prompt: str) -> float:
        return self.contexts[prompt][1] if prompt in self.contexts else 0.0


class _Running:
    """One model in the middle of its texts, with its keys and values."""

    def __init__(self, model: Edited, rows: Sequence[Sequence[int]], more: int) -> None:
        self.model = model
        backbone = model.backbone
        self.ids, self.mask = (t.to(backbone.device) for t in pad(rows, pad_id(backbone.tokenizer), side="left"))
        model._check_room(self.mask.shape[1] + more - 1)
        self.cache: Any = DynamicCache(config=backbone.model.config)

    def logits(self) -> Tensor:
        """Of the next token [B, V]."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        options = {"cache": self.cache, "position_ids": positions, "use_cache": True}
        out, _ = self.model.decode(self.ids, self.mask, **options)
        return self.model.backbone.logits(out.last_hidden_state[:, -1])

    def take(self, tokens: Tensor) -> None:
        """Go on with these tokens [B]."""
        self.ids = tokens[:, None].to(self.mask.device)
        self.mask = torch.cat([self.mask, torch.ones_like(self.ids)], dim=1)


def _shared(one: Encoded, other: Encoded) -> int:
    """How many of the target's last tokens both have, none of them a text's first."""
    most = min(len(one.ids) - max(one.target_start, 1), len(other.ids) - max(other.target_start, 1))
    n = 0
    while n < most and one.ids[-1 - n] == other.ids[-1 - n]:
        n += 1
    return n
