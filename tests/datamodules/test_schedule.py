"""The schedule: which records, which pools, on which rank, and from where a resumed run goes on."""

from collections import Counter

import pytest

from datamodules.schedule import Place, PoolSchedule, epoch_order, pool_sizes

SIZES, RATES = [8, 16, 32, 64, 128], [0.05, 0.05, 0.05, 0.15, 0.7]


def schedule(records: int = 100, per_batch: int = 8, **more: object) -> PoolSchedule:
    return PoolSchedule([records], per_batch, [2, 4], [0.5, 0.5], **more)  # type: ignore[arg-type]


def step_of(sampler: PoolSchedule, step: int) -> list[list[Place]]:
    """The micro-batches of one optimizer step on one rank."""
    return list(sampler)[step * sampler.batches_per_step : (step + 1) * sampler.batches_per_step]


def test_pool_sizes_cover_the_batch_and_depend_on_their_arguments_only() -> None:
    drawn = [pool_sizes(0, 1, batch, 256, SIZES, RATES) for batch in range(50)]
    assert all(sum(sizes) == 256 for sizes in drawn)
    assert all(size in SIZES for sizes in drawn for size in sizes[:-1])
    assert drawn == [pool_sizes(0, 1, batch, 256, SIZES, RATES) for batch in range(50)]
    assert drawn != [pool_sizes(1, 1, batch, 256, SIZES, RATES) for batch in range(50)]
    assert drawn != [pool_sizes(0, 2, batch, 256, SIZES, RATES) for batch in range(50)]
    assert len({tuple(sizes) for sizes in drawn}) > 10


def test_pool_sizes_are_drawn_at_their_rates() -> None:
    # the first pool of each batch is never cut, so it alone has the rates as they are
    first = Counter(pool_sizes(0, 0, batch, 128, SIZES, RATES)[0] for batch in range(4000))
    chi_square = sum((first[s] - 4000 * r) ** 2 / (4000 * r) for s, r in zip(SIZES, RATES, strict=True))
    assert chi_square < 18.5  # p = 0.001 at 4 degrees of freedom


def test_order_is_a_permutation_of_each_epoch() -> None:
    orders = [epoch_order(0, epoch, [1000]).tolist() for epoch in range(3)]
    assert all(sorted(o) == list(range(1000)) for o in orders)
    assert orders[0] != orders[1] != orders[2]


def test_weighted_order_draws_at_the_weights_until_a_source_is_exhausted() -> None:
    lengths, weights = [6000, 3000, 300], [1.0, 2.0, 1.0]
    order = epoch_order(0, 0, lengths, weights)
    assert sorted(order) == list(range(9300))
    source = (order >= 6000).astype(int) + (order >= 9000)
    shares = [float((source[:1000] == i).mean()) for i in range(3)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.05)
    small_ends = int((source == 2).nonzero()[0][-1])
    after = source[small_ends + 1 : small_ends + 2001]
    assert (after == 1).mean() == pytest.approx(2 / 3, abs=0.05)  # 1 : 2 among the two that are left
    assert order[source == 0].tolist() != sorted(order[source == 0])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_are_disjoint_and_do_equal_work(world_size: int) -> None:
    ranks = [list(schedule(world_size=world_size, rank=r)) for r in range(world_size)]
    assert {len(batches) for batches in ranks} == {100 // (8 * world_size)}
    assert all(len(batch) == 8 for batches in ranks for batch in batches)
    indices = [place.index for batches in ranks for batch in batches for place in batch]
    assert len(indices) == len(set(indices))
    pools = [[[place.pool for place in batch] for batch in batches] for batches in ranks]
    assert all(p == pools[0] for p in pools)


def test_a_step_is_the_same_slots_however_it_is_spread() -> None:
    spreads = [(8, 1, 2), (8, 2, 1), (4, 2, 2), (2, 8, 1)]
    for step in range(6):
        steps = []
        for per_batch, world_size, accumulate in spreads:
            of_rank = [
                step_of(schedule(100, per_batch, world_size=world_size, rank=r, batches_per_step=accumulate), step)
                for r in range(world_size)
            ]
            steps.append(sorted((p.index, p.seed) for batches in of_rank for batch in batches for p in batch))
        assert len(steps[0]) == 16
        assert all(s == steps[0] for s in steps)


def test_a_step_has_the_same_pools_on_ranks_as_in_accumulation() -> None:
    """Edits that compete are the same ones, so the same update can come of it."""
    for step in range(6):
        steps = []
        for world_size, accumulate in [(1, 4), (2, 2), (4, 1)]:
            of_rank = [
                step_of(schedule(100, 4, world_size=world_size, rank=r, batches_per_step=accumulate), step)
                for r in range(world_size)
            ]
            pools: dict[tuple[int, int, int], list[int]] = {}
            for r, batches in enumerate(of_rank):
                for b, batch in enumerate(batches):
                    for place in batch:
                        pools.setdefault((r, b, place.pool), []).append(place.index)
            steps.append(sorted(map(sorted, pools.values())))
        assert 4 <= len(steps[0]) <= 8
        assert steps[0] == steps[1] == steps[2]


def test_seeds_are_distinct_and_change_with_the_epoch() -> None:
    sampler = schedule()
    seeds = [place.seed for _ in range(2) for batch in sampler for place in batch]
    assert len(seeds) == len(set(seeds)) == 2 * 96


def test_an_epoch_leaves_out_the_tail_that_fills_no_step() -> None:
    assert len(schedule(100, 8, batches_per_step=5)) == len(list(schedule(100, 8, batches_per_step=5))) == 10
    with pytest.raises(ValueError, match=r"39 records do not fill one optimizer step of 40 .* lower records_per_batch"):
        schedule(39, 8, batches_per_step=5)


@pytest.mark.parametrize("done", [0, 1, 11, 12, 13, 30])
def test_start_goes_on_where_the_run_was(done: int) -> None:
    whole, rest = schedule(), schedule(start=done)
    expected = [batch for _ in range(4) for batch in whole][done:]
    got = [batch for _ in range(4 - done // len(whole)) for batch in rest]
    assert got == expected


def test_an_iteration_that_is_begun_again_is_the_same() -> None:
    sampler = schedule(start=15)
    next(iter(sampler))
    sampler.set_epoch(1)
    assert list(sampler) == list(schedule(start=15))
    sampler.set_epoch(2)
    assert list(sampler) == list(schedule(start=24))


def test_no_shuffle_keeps_the_order() -> None:
    sampler = schedule(shuffle=False)
    for _ in range(2):
        assert [place.index for batch in sampler for place in batch] == list(range(96))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records_per_batch": 0}, "records_per_batch must be at least 1"),
        ({"sizes": []}, "pool_sizes must be"),
        ({"sizes": [0, 4]}, "pool_sizes must be"),
        ({"rates": [1.0]}, "pool_rates must have one rate for each of the 2 pool_sizes, got 1"),
        ({"rates": [1.0, -1.0]}, "pool_rates must be non-negative"),
        ({"rates": [0.0, 0.0]}, "pool_rates must be non-negative and not all zero"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
    ],
)
def test_wrong_settings_are_named(change: dict[str, object], message: str) -> None:
    settings = {"lengths": [10], "records_per_batch": 2, "sizes": [2, 4], "rates": [0.5, 0.5], **change}
    with pytest.raises(ValueError, match=message):
        PoolSchedule(**settings)  # type: ignore[arg-type]
