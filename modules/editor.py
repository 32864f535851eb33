"""What every editor is: something that turns a backbone and requests into an edited model, for the length of a `with`.

    with editor.edit(backbone, requests) as edited:
        edited.score(prompts, targets)
        edited.generate(prompts)
        with edited.edit(more) as further: ...
    # here the backbone is what it was, also after an exception

B rows, T tokens, d hidden width, n target tokens, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from datamodules.records import EditRequest
from datamodules.tokens import Encoded, continuation, encode, pad, pad_id
from modules.backbone import Backbone
from modules.interventions import LowRank
from modules.prefixes import alike, can_share, repeated


@dataclass(frozen=True)
class TargetScore:
    """Teacher-forced scores of one target: log-probabilities, the most probable tokens, and the target's own, each [n].

    n is 0 only where the target's single token opens the text, so that nothing predicts it.

    Args:
        top: the k most probable tokens at each place, the first of them first [n, k]; k is 0 unless they are asked for.
    """

    log_probs: Tensor
    predicted: Tensor
    target: Tensor
    top: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))

    @property
    def accuracy(self) -> float:
        """Share of target tokens that are the most probable ones (EasyEdit's token accuracy)."""
        return float((self.predicted == self.target).float().mean()) if len(self.target) else 0.0


class Edited:
    """A backbone under edits. Subclasses say what differs: the context, the decoder's pass, or both.

    Args:
        backbone: the model that answers.
        bos: whether queries begin with a BOS, where the tokenizer uses one.
        context: text that stands before every prompt; its keys and values are computed once.

    Attributes:
        reads_prompts: what a prompt says, as text or where it ends, decides which edit answers; without one, none does.
    """

    reads_prompts = False

    def __init__(self, backbone: Backbone, bos: bool = True, context: str = "") -> None:
        self.backbone = backbone
        self.bos = bos
        self.context = context
        self._prefix: tuple[Tensor, Any] | None = None

    def decode(self, ids: Tensor, mask: Tensor, state: Any = None, **options: Any) -> tuple[Any, Any]:
        """Run the decoder on ids [B, T]; mask [B, T'] covers cached tokens too.

        Returns:
            transformers' decoder output (last_hidden_state [B, T, d]), and the state to hand in with the next tokens.
        """
        return self.backbone.decode(input_ids=ids, attention_mask=mask, **options), None

    @property
    def shares_prefixes(self) -> bool:
        """Whether tokens that rows begin with may be read once for all of them, with their keys and values as all that
        is kept. A subclass with a `decode` of its own says so, if nothing in it looks back or ahead by other ways."""
        return type(self).decode is Edited.decode

    def edit(self, requests: Sequence[EditRequest]) -> "AbstractContextManager[Edited]":
        """Consecutive editing, on top of what is already edited."""
        raise NotImplementedError(f"{type(self).__name__} cannot take further edits; make all edits in one call")

    def save(self, folder: Path) -> None:
        """Write the edits' state to a folder."""
        raise NotImplementedError(f"{type(self).__name__} has no state to save")

    def restored(self, folder: Path) -> "Edited":
        """The same method and backbone with the edits that `save` wrote to a folder, in place of its own.

        Raises:
            ValueError: where the folder holds none, or those of another method or model.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot go on from saved edits; make them again")

    def context_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens the method puts before each prompt, a BOS not among them: what table 5 of DistillMIKE calls
        the prompt length."""
        length = len(encode(self.backbone.tokenizer, self.context, bos=False).ids) if self.context else 0
        return [length] * len(prompts)

    def weight_changes(self) -> Mapping[str, LowRank | Tensor]:
        """What all edits so far add to each weight, by the linear layer's name: a term of one row, or [d_in, d_out].
        Empty where edits are no change of weights."""
        return {}

    @torch.no_grad()
    def score(
        self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32, top_k: int = 0
    ) -> list[TargetScore]:
        """Teacher-forced log-probabilities of each target after its prompt, and with `top_k` so many tokens as well.

        Raises:
            ValueError: where context, prompt and target together do not fit the context window.
        """
        rows = [
            encode(self.backbone.tokenizer, p, t, bos=self.bos and not self.context, after=self.context)
            for p, t in zip(prompts, targets, strict=True)
        ]
        return self._score_rows(rows, batch_size, top_k)

    def _score_rows(self, rows: Sequence[Encoded], batch_size: int, top_k: int) -> list[TargetScore]:
        scores: dict[int, TargetScore] = {}
        for reader, batch, read in self._batches([r.ids for r in rows], [r.target_start for r in rows], batch_size):
            left = [Encoded(rows[i].ids[read:], rows[i].target_start - read) for i in batch]
            scores.update(zip(batch, reader._score(left, top_k), strict=True))
        return [scores[i] for i in range(len(rows))]

    def _score(self, rows: Sequence[Encoded], top_k: int = 0) -> list[TargetScore]:
        ids, mask = (t.to(self.backbone.device) for t in pad([r.ids for r in rows], pad_id(self.backbone.tokenizer)))
        prefix, mask, options = self._after_prefix(mask)
        self._check_room(mask.shape[1])
        hidden = self.decode(ids, mask, **options)[0].last_hidden_state  # [B, T, d]
        # token i is predicted at i - 1; the context's last token predicts the first one
        spans = [range(max(r.target_start, 0 if prefix is not None else 1), len(r.ids)) for r in rows]
        picked = torch.cat(
            [
                hidden[b, i - 1][None] if i else prefix[None].to(hidden)  # type: ignore[index]
                for b, span in enumerate(spans)
                for i in span
            ]
            or [hidden[:0, 0]]
        )
        labels = torch.cat([ids[b, span.start : span.stop] for b, span in enumerate(spans)])
        log_probs, predicted, top = [], [], []
        for h, label in zip(picked.split(512), labels.split(512), strict=True):  # never [all tokens, V]
            logp = self.backbone.logits(h).float().log_softmax(-1)
            log_probs.append(logp.gather(1, label[:, None])[:, 0].cpu())
            predicted.append(logp.argmax(-1).cpu())
            k = min(top_k, logp.shape[-1])
            top.append(logp.topk(k).indices.cpu() if k else logp.new_empty(len(h), 0, dtype=torch.long).cpu())
        sizes = [len(s) for s in spans]
        parts = (torch.cat(log_probs), torch.cat(predicted), labels.cpu(), torch.cat(top))
        return [TargetScore(*row) for row in zip(*(part.split(sizes) for part in parts), strict=True)]

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], max_new_tokens: int = 16, batch_size: int = 32) -> list[str]:
        """Greedy continuations, without the prompts, cut at the first end-of-text token: `prompt + continuation` is the
        whole text, with a space between them or none, as the model wrote it.

        Raises:
            ValueError: for an empty prompt, or where a continuation would leave the context window.
        """
        bos, after = self.bos and not self.context, self.context
        rows = [encode(self.backbone.tokenizer, p, bos=bos, after=after).ids for p in prompts]
        return self._generate_rows(rows, max_new_tokens, batch_size)

    def _generate_rows(self, rows: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> list[str]:
        texts: dict[int, str] = {}
        for reader, batch, read in self._batches(rows, [len(row) - 1 for row in rows], batch_size):
            new = reader._generate([rows[i][read:] for i in batch], max_new_tokens)
            tokenizer = self.backbone.tokenizer
            texts.update((i, continuation(tokenizer, rows[i], ids)) for i, ids in zip(batch, new, strict=True))
        return [texts[i] for i in range(len(rows))]

    def _batches(
        self, rows: Sequence[Sequence[int]], most: Sequence[int], batch_size: int
    ) -> Iterator[tuple["Edited", list[int], int]]:
        """Rows in batches of similar length, for less padding: who reads them, their numbers, and how many tokens of
        each it has read already. `most`: see `alike`."""
        share = self.shares_prefixes and can_share(self.backbone.model.config)
        for numbers, shared in alike(rows, most if share else [0] * len(rows)):
            reader = self._having_read(rows[numbers[0]][:shared]) if shared else self
            order = sorted(numbers, key=lambda i: len(rows[i]))
            for at in range(0, len(order), batch_size):
                yield reader, order[at : at + batch_size], shared

    def _having_read(self, row: Sequence[int]) -> "Edited":
        """The same, having read some tokens after the context, with which all its rows begin."""
        reader = copy(self)
        ids = torch.tensor([row], device=self.backbone.device)
        _, mask, options = self._after_prefix(torch.ones_like(ids))
        self._check_room(mask.shape[1])
        out, _ = self.decode(ids, mask, **{"use_cache": True, **options})
        reader._prefix = (out.last_hidden_state[0, -1], out.cache)
        return reader

    def _generate(self, rows: Sequence[Sequence[int]], max_new_tokens: int) -> list[list[int]]:
        tokenizer = self.backbone.tokenizer
        ids, mask = (t.to(self.backbone.device) for t in pad(rows, pad_id(tokenizer), side="left"))
        _, mask, options = self._after_prefix(mask)
        self._check_room(mask.shape[1] + max_new_tokens - 1)  # the last new token is not read again
        cache = options.get("cache") or DynamicCache(config=self.backbone.model.config)
        end: Any = tokenizer.eos_token_id
        new: list[list[int]] = [[] for _ in rows]
        done = [False] * len(rows)
        state: Any = None
        for _ in range(max_new_tokens):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out, state = self.decode(ids, mask, state, cache=cache, position_ids=positions, use_cache=True)
            ids = self.backbone.logits(out.last_hidden_state[:, -1]).argmax(-1, keepdim=True)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            tokens: list[int] = ids[:, 0].tolist()
            for b, token in enumerate(tokens):
                done[b] = done[b] or token == end
                if not done[b]:
                    new[b].append(token)
            if all(done):
                break
        return new

    def _check_room(self, used: int) -> None:
        """Refuse what is longer than the context window; learned positions would fail there, on CUDA beyond repair."""
        room = getattr(self.backbone.model.config, "max_position_embeddings", None)
        if room and used > room:
            raise ValueError(f"{used} tokens (context, prompt and answer) do not fit the context window of {room}")

    def _after_prefix(self, mask: Tensor) -> tuple[Tensor | None, Tensor, dict[str, Any]]:
        """What was read before a batch: its last state [d], the mask grown by it, and what the decoder needs of it."""
        if self._prefix is None and not self.context:
            return None, mask, {}
        if self._prefix is None:
            row = encode(self.backbone.tokenizer, self.context, bos=self.bos).ids
            ids = torch.tensor([row], device=self.backbone.device)
            out, _ = self.decode(ids, torch.ones_like(ids), use_cache=True)
            self._prefix = (out.last_hidden_state[0, -1], out.cache)
        last, cached = self._prefix
        length = cached.get_seq_length()
        cache = repeated(cached, len(mask))
        mask = torch.cat([mask.new_ones(len(mask), length), mask], dim=1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, length:]
        return last, mask, {"cache": cache, "position_ids": positions, "use_cache": True}


class Editor(ABC):
    """A method of editing.

    Attributes:
        name: how results and configs call it.
        own_edit_only: an upper bound that is given each record's own edit, and no others.
        reads_pool: whether it matters how many other edits there are; where not, one pool size tells all.
    """

    name: str
    own_edit_only = False
    reads_pool = True

    @abstractmethod
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> AbstractContextManager[Edited]:
        """Edit the backbone for the length of a `with`.

        Raises:
            ValueError: for requests that the method cannot serve, before any work.
        """


class TrainedEditor(Editor):
    """An editor that was trained, with the model that it was trained for."""

    @property
    @abstractmethod
    def reader(self) -> Backbone:
        """The model that answers: what to hand to `edit`."""

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Move everything that edits and answers to a device."""
