"""Rows that begin alike, as prompts with the same demonstrations do: what they share is read once for all of them.

n rows.
"""

from collections.abc import Sequence
from copy import copy
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

STEP = 64  # tokens: less is not worth sharing, and rows of a group that share so many more do not part for it
ROOM = 64  # tokens: what is copied again after so many more
PASS = 256  # tokens: what a pass of its own and smaller batches cost


class Alike(NamedTuple):
    """Numbers of rows, and how many tokens all of them begin with that are read once; 0: each row is read whole."""

    rows: list[int]
    shared: int


def alike(rows: Sequence[Sequence[int]], most: Sequence[int]) -> list[Alike]:
    """Put rows into groups so that few tokens are read in all, those that share nothing worthwhile first, in one group.

    Args:
        rows: token ids.
        most: so many tokens of each row can be read beforehand, at most.
    """
    heads = [tuple(row[:count]) for row, count in zip(rows, most, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: heads[i])  # rows that begin alike lie together
    between = [_shared(heads[a], heads[b]) for a, b in pairwise(order)]
    _, spans = _best(between, 0, len(rows))
    grouped = {order[i] for start, end, _ in spans for i in range(start, end)}
    alone = [i for i in range(len(rows)) if i not in grouped]
    found = [Alike(sorted(order[start:end]), shared) for start, end, shared in spans]
    return [Alike(alone, 0), *found] if alone else found


def _best(between: Sequence[int], start: int, end: int) -> tuple[int, list[tuple[int, int, int]]]:
    """Tokens that the best groups of sorted rows from `start` to `end` save, and these groups with what they share:
    the rows as one group, or parted where neighbours share least."""
    if end - start < 2 or max(between[start : end - 1]) < STEP:
        return 0, []
    shared = min(between[start : end - 1])
    cuts = [i + 1 for i in range(start, end - 1) if between[i] // STEP == shared // STEP]
    parts = [_best(between, a, b) for a, b in pairwise([start, *cuts, end])]
    apart = sum(saved for saved, _ in parts)
    together = shared * (end - start - 1) - PASS if shared >= STEP else 0
    if together > apart:
        return together, [(start, end, shared)]
    return apart, [span for _, spans in parts for span in spans]


def _shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def can_share(config: PretrainedConfig) -> bool:
    """Whether all that a model keeps of tokens is their keys and values: not where layers are recurrent."""
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)


class Roomy(DynamicLayer):
    """Keys and values [B, h, T, dh] with room behind them: a token more does not copy all that are there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._held: list[Tensor] = []  # what keys and values are the beginning of

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        used, all_ = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        fits = self._held and self._held[0].shape[-2] >= all_
        if not fits or self.keys.data_ptr() != self._held[0].data_ptr():  # or something else was put in their place
            self._held = [_with_room(t, all_ + ROOM) for t in (self.keys, self.values)]  # type: ignore[arg-type]
        for held, new in zip(self._held, (key_states, value_states), strict=True):
            held[..., used:all_, :] = new
        self.keys, self.values = (held[..., :all_, :] for held in self._held)
        return self.keys, self.values


def _with_room(kept: Tensor, length: int) -> Tensor:
    held = kept.new_empty(*kept.shape[:-2], length, kept.shape[-1])
    held[..., : kept.shape[-2], :] = kept
    return held


def repeated(cached: Any, count: int) -> Cache:
    """What was kept of one row, for `count` rows that go on after it; what was kept stays as it is."""
    cache: Cache = copy(cached)
    cache.layers = [copy(layer) for layer in cached.layers]  # sliding windows count their tokens themselves
    for i, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, Roomy):
            layer.batch_repeat_interleave(count)
        elif layer.is_initialized:  # no copy: one is made anyway when the layer grows
            layer.keys, layer.values = (t.expand(count, -1, -1, -1) for t in (layer.keys, layer.values))
            if type(layer) is not DynamicSlidingWindowLayer:
                cache.layers[i] = Roomy(layer.keys, layer.values)
    return cache
