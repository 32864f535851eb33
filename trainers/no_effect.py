"""Options of trainers.evaluate that would have no effect: refused, since whoever gave one means something by it."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

# beside a benchmark: the key of the grid that has it
IN_THE_GRID = {
    "records": "edits in benchmark.runs",
    "pool_sizes": "edits of a run {mode: batch, edits: [...]} in benchmark.runs",
    "singles": "edits of a run {mode: single, edits: [...]} in benchmark.runs",
    "queries_per_kind": "queries_per_kind in benchmark.datasets",
    "asked": "asked in benchmark.runs",
    "exact_match": "exact_match in benchmark.datasets",
    "mode": "mode in benchmark.runs",
    "batch": "batch in benchmark.runs",
    "checkpoints": "edits in benchmark.runs",
    "out": "benchmark.out",
}


def refuse_beside_a_benchmark(command: Callable[..., Any], **given: Any) -> None:
    """Refuse what a grid has keys of its own for.

    Args:
        command: whose parameters have the defaults.
        given: all options of `IN_THE_GRID`.

    Raises:
        ValueError: for the first one that is not its default; it names the grid's key.
    """
    defaults = inspect.signature(command).parameters
    for name, key in IN_THE_GRID.items():
        if given[name] != defaults[name].default:
            raise ValueError(f"--{name} {_said(given[name])} has no effect on a benchmark: leave it out, and set {key}")


def refuse_beside_a_mode(
    mode: str, batch: int | None, pool_sizes: Sequence[int] | None, singles: int | None, sizes: Sequence[int]
) -> None:
    """Refuse sizes of pools that are not made.

    Args:
        pool_sizes, singles: as given; None: not given, or the default.
        sizes: of the pools that are made.

    Raises:
        ValueError: it names the mode that has them, or what stands in their place.
    """
    if pool_sizes is not None and (mode != "batch" or batch is not None):
        here = f"the mode is {mode}" if mode != "batch" else f"--batch {batch} is the one size"
        raise ValueError(f"--pool_sizes {_said(pool_sizes)} has no effect: it is of --mode batch, and {here}")
    if singles is not None and mode != "batch":
        raise ValueError(
            f"--singles {singles} has no effect: it is of --mode batch, and the mode is {mode}; --records says how "
            "many are edited"
        )
    if singles is not None and 1 not in sizes:
        raise ValueError(f"--singles {singles} has no effect: it is of pools of 1, and the sizes are {_said(sizes)}")


def _said(value: Any) -> str:
    """As a user writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
