"""Which records form which micro-batch, and how a micro-batch is split into pools.

Everything here is a pure function of the seed, the epoch and the place in the epoch. So all ranks agree without talking
to each other, and a run resumes at the exact record from its step count alone.

R records of a micro-batch on one rank, W ranks, A micro-batches of an optimizer step: a step is R * W * A records.
"""

import random
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from datamodules.records import EditRecord


class Slot(NamedTuple):
    """One record's place in a micro-batch: the pool it belongs to, and the seed its queries are drawn with."""

    record: EditRecord
    pool: int
    seed: int


class Place(NamedTuple):
    """A slot before its record is looked up: the record's index in the data set, its pool, its seed."""

    index: int
    pool: int
    seed: int


def stable_hash(*key: object) -> int:
    """63 bits from the texts of the key's parts: the same in every process and on every machine."""
    return int.from_bytes(blake2b("/".join(map(str, key)).encode(), digest_size=8).digest(), "big") >> 1


def pool_sizes(seed: int, epoch: int, step: int, total: int, sizes: Sequence[int], rates: Sequence[float]) -> list[int]:
    """Split a micro-batch into pools: sizes drawn at the given rates until `total` is covered, the last one cut to fit.

    Args:
        seed, epoch, step: what the draw depends on; `step` counts the optimizer steps of the epoch.
        total: records of the micro-batch (on one rank).
        sizes, rates: the sizes to draw from, and how often each is drawn (relative).
    """
    draw = random.Random(stable_hash("pools", seed, epoch, step))
    drawn: list[int] = []
    left = total
    while left:
        size = min(left, draw.choices(sizes, rates)[0])
        drawn.append(size)
        left -= size
    return drawn


def epoch_order(seed: int, epoch: int, lengths: Sequence[int], weights: Sequence[float] | None = None) -> np.ndarray:
    """The order of one epoch's records, each exactly once [sum(lengths)].

    Without weights a permutation of all records. With weights the next record is drawn from source i at weight i among
    the sources that have records left; within a source the order is random.

    Args:
        lengths: records of each source; source i's indices follow source i-1's.
        weights: positive, one for each source.
    """
    # RandomState, because numpy keeps its stream the same in all versions
    draw = np.random.RandomState(stable_hash("order", seed, epoch) % 2**32)
    if weights is None:
        return draw.permutation(sum(lengths))
    # Let source i's records arrive at random, i at rate weights[i]. Exponential waits have no memory, so whichever
    # sources are left, the next arrival is source i's with probability proportional to its weight.
    arrivals = [np.cumsum(draw.standard_exponential(n)) / weight for n, weight in zip(lengths, weights, strict=True)]
    starts = np.cumsum([0, *lengths[:-1]])
    shuffled = [start + draw.permutation(n) for start, n in zip(starts, lengths, strict=True)]
    return np.concatenate(shuffled)[np.argsort(np.concatenate(arrivals), kind="stable")]


class PoolSchedule(Sampler[list[Place]]):
    """The micro-batches of one rank, epoch after epoch: a batch sampler.

    Micro-batch m of an epoch is the slice [m R W, (m + 1) R W) of the epoch's order, and each rank takes its own R
    records of it. The tail of an epoch that does not fill an optimizer step on all ranks is left out (other records the
    next time). A slot's seed depends on its position in the epoch alone, and pool sizes are drawn once for an optimizer
    step. So with R and W * A held fixed a step is the same slots in the same pools at any world size; with R * W * A
    held fixed it is the same slots, and only the pools they are in change with R.

    An iteration covers the epoch given by `set_epoch`, by default the one after the last. The epoch in which `start`
    lies begins there, however often it is iterated, and other epochs at their beginning.

    Args:
        lengths: records of each source of the data set; their sum is the number of records.
        records_per_batch: R.
        sizes, rates: see `pool_sizes`.
        batches_per_step: A.
        seed: draws the order, the pools and the slots' seeds.
        rank, world_size: this rank, and W.
        start: micro-batches (of one rank) that were done before, counted from the beginning of the training.
        weights: see `epoch_order`.
        shuffle: False keeps the data set's order in every epoch.

    Raises:
        ValueError: for settings that make no schedule, or if the records do not fill one optimizer step.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        records_per_batch: int,
        sizes: Sequence[int],
        rates: Sequence[float],
        batches_per_step: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
    ) -> None:
        check_pools(records_per_batch, sizes, rates)
        if batches_per_step < 1 or not 0 <= rank < world_size or start < 0:
            raise ValueError(
                f"a schedule needs batches_per_step >= 1, 0 <= rank < world_size and start >= 0; "
                f"got {batches_per_step=}, {rank=}, {world_size=}, {start=}"
            )
        self.records, self.per_step = sum(lengths), records_per_batch * world_size * batches_per_step
        if self.records < self.per_step:
            raise ValueError(
                f"{self.records} records do not fill one optimizer step of {self.per_step} = records_per_batch "
                f"{records_per_batch} x {world_size} ranks x accumulate_grad_batches {batches_per_step}; "
                "lower records_per_batch or the accumulation, or add data"
            )
        self.lengths, self.weights, self.shuffle = list(lengths), weights, shuffle
        self.batch_size = records_per_batch  # Lightning and DeepSpeed look for this name
        self.batches_per_step = batches_per_step
        self.sizes, self.rates = list(sizes), list(rates)
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.start = start
        self.epoch: int | None = None

    @property
    def sampler(self) -> "PoolSchedule":
        """Itself: Lightning calls `set_epoch` on a batch sampler's `sampler`, never on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration cover this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Micro-batches of a whole epoch, always whole optimizer steps."""
        return self.records // self.per_step * self.batches_per_step

    def __iter__(self) -> Iterator[list[Place]]:
        # Not itself a generator: which epoch it is must be settled now, not when a worker asks for the first batch.
        first, done = divmod(self.start, len(self))
        epoch = first if self.epoch is None else self.epoch
        return self._batches(epoch, done if epoch == first else 0)

    def _batches(self, epoch: int, begin: int) -> Iterator[list[Place]]:
        order = epoch_order(self.seed, epoch, self.lengths, self.weights) if self.shuffle else np.arange(self.records)
        for batch in range(begin, len(self)):
            yield self._places(order, epoch, batch)
        self.epoch = epoch + 1

    def _places(self, order: np.ndarray, epoch: int, batch: int) -> list[Place]:
        first = (batch * self.world_size + self.rank) * self.batch_size
        drawn = pool_sizes(self.seed, epoch, batch // self.batches_per_step, self.batch_size, self.sizes, self.rates)
        pools = [pool for pool, size in enumerate(drawn) for _ in range(size)]
        return [
            Place(int(order[at]), pool, stable_hash("slot", self.seed, epoch, at))
            for at, pool in enumerate(pools, first)
        ]


def check_pools(records_per_batch: int, sizes: Sequence[int], rates: Sequence[float]) -> None:
    """Refuse settings from which no pools can be drawn.

    Raises:
        ValueError: names the setting.
    """
    if records_per_batch < 1:
        raise ValueError(f"records_per_batch must be at least 1, got {records_per_batch}")
    if not sizes or min(sizes) < 1:
        raise ValueError(f"pool_sizes must be one or more positive numbers, got {list(sizes)}")
    if len(rates) != len(sizes):
        raise ValueError(f"pool_rates must have one rate for each of the {len(sizes)} pool_sizes, got {len(rates)}")
    if min(rates) < 0 or not any(rates):
        raise ValueError(f"pool_rates must be non-negative and not all zero, got {list(rates)}")
