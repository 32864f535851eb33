"""What a benchmark spans, and what makes two cells the same."""

from dataclasses import replace

import pytest

from datamodules.records import EditRecord
from datamodules.sources import Source
from trainers.benchmark.grid import Benchmark, Cell, GridDataset, GridRun, refuse_one_place, spans

FACTS = GridDataset([Source("facts", options={"split": "test"})])


def cell(records: list[EditRecord]) -> Cell:
    return Cell("facts", "memit, heavy", "batch", (2,), 0, records[:2], {"weight": 1}, {"seed": 0})


def test_a_batch_is_a_cell_a_number_and_a_sequence_one_cell() -> None:
    assert list(spans(GridRun("batch", [100, 1, 100]))) == [(1, (1,)), (100, (100,))]
    assert list(spans(GridRun("consecutive", [10, 200], batch=10))) == [(200, (10, 200))]
    assert list(spans(GridRun("sequential", [3]))) == [(3, (3,))]
    assert [GridRun(m, [1], b).steps for m, b in (("single", None), ("sequential", None), ("consecutive", 7))] == [
        1,
        1,
        7,
    ]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "edits", "batch"),
    [
        ("batch", [], None),
        ("batch", [0], None),
        ("batch", [1], 5),
        ("consecutive", [10], None),
        ("consecutive", [9], 0),
    ],
)
def test_runs_that_cannot_be(mode: str, edits: list[int], batch: int | None) -> None:
    with pytest.raises(ValueError, match=r"benchmark\.runs"):
        GridRun(mode, edits, batch)  # type: ignore[arg-type]


def test_names_that_are_no_folders() -> None:
    with pytest.raises(ValueError, match=r"benchmark\.datasets: '\.\./x'"):
        Benchmark({"../x": FACTS}, [GridRun("batch", [1])])
    with pytest.raises(ValueError, match="needs datasets and runs"):
        Benchmark({"facts": FACTS}, [])
    assert Benchmark({"facts": FACTS}, [GridRun("batch", [3, 8]), GridRun("single", [5])]).most() == 8


def test_a_cell_is_known_by_all_that_its_result_hangs_on(records: list[EditRecord]) -> None:
    one = cell(records)
    assert one.key() == cell(records).key()
    changed = [
        replace(one, facts={"weight": 2}),
        replace(one, about={"seed": 1}),
        replace(one, records=records[1:3]),
        replace(one, mode="single"),
        replace(one, editor="memit"),
    ]
    keys = {c.key() for c in changed}
    assert len(keys) == len(changed)
    assert one.key() not in keys


def test_the_batch_size_makes_no_other_cell_and_keys_of_before_hold() -> None:
    about = {"seed": 0, "weights": "w", "protocol": "default"}
    one = Cell("facts", "memit", "batch", (2,), 0, [], {"weight": 1}, about)
    eight = replace(one, batch_size=8)
    # by the code that had the batch size in the key, for 32 and 8
    of_before = (
        "d5451477ca574913ff81d894988d64c101d00bdfa78128a1c430efeb2dc00c0a",
        "2dff162926cbcb1af1c3796b1865457b8fc503d0b2a8d22ca683f86716b88f86",
    )
    assert (one.keys, eight.keys) == (of_before[:1], of_before)
    assert one.key() == eight.key()
    assert eight.holds({"key": of_before[1]})
    assert not one.holds({"key": of_before[1]})


def test_a_cell_is_not_finished_where_a_file_or_the_backbones_config_is_another(records: list[EditRecord]) -> None:
    one = replace(cell(records), files={"shown.json": "1a"}, overrides={"rope_theta": 5})
    assert one.key() == cell(records).key()
    told = {"key": one.key(), "files": {"shown.json": "1a"}, "backbone": {"overrides": {"rope_theta": 5}}}
    assert one.holds(told)
    assert one.holds({"key": one.key()})  # results of before tell neither
    assert not one.holds(told | {"key": "x"})
    assert not one.holds(told | {"files": {"shown.json": "2b"}})
    assert not one.holds(told | {"files": {"other.json": "1a"}})
    assert not one.holds(told | {"backbone": {"overrides": {}}})


def test_editors_whose_cells_would_be_one_file(records: list[EditRecord]) -> None:
    one = cell(records)
    refuse_one_place([one, replace(one, editor="memit"), replace(one, mode="single")])
    with pytest.raises(
        ValueError, match="editors 'memit, heavy' and 'memit_heavy' would both write facts/batch-2/memi"
    ):
        refuse_one_place([one, replace(one, editor="memit_heavy")])
