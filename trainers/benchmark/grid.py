"""What a benchmark is made of: data sets, runs, and the cells that they and the editors span."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from datamodules.records import EditRecord
from datamodules.sources import Source
from modules.evaluation import check_queries_per_kind
from trainers.protocols import Demonstrations, Judging, Protocol

Mode = Literal["single", "batch", "sequential", "consecutive"]
BATCH_SIZE = 32  # that every key has, see `Cell.keys`


@dataclass
class GridDataset:
    """Records, and by which protocol they are judged.

    Args:
        data: where they come from.
        protocol: as `--protocol` of trainers.evaluate.
        exact_match: of the default protocol: also generate and compare whole answers.
        queries_per_kind: ask only so many rephrases, and locality and portability queries of each kind, of a record.
        demonstrations: of the protocol mquake.
        fluency: of the protocol counterfact: let the models write too, and measure it (GE).
        references: of the protocol counterfact: texts for the consistency (RS) of what is written.

    Raises:
        ValueError: for `queries_per_kind` below 1.
    """

    data: list[Source]
    protocol: Protocol = "default"
    exact_match: bool = False
    queries_per_kind: int | None = None
    demonstrations: Demonstrations = field(default_factory=Demonstrations)
    fluency: bool = False
    references: str | None = None

    def __post_init__(self) -> None:
        check_queries_per_kind(self.queries_per_kind, "benchmark.datasets: queries_per_kind")

    @property
    def judging(self) -> Judging:
        """How answers are judged."""
        return Judging(self.protocol, self.exact_match, self.demonstrations, self.fluency, self.references)


@dataclass
class GridRun:
    """How records are edited.

    Args:
        mode: as `--mode` of trainers.evaluate.
        edits: of `batch`: numbers of records edited at once, each a cell; of `sequential` and `consecutive`: the
            numbers of records so far at which is evaluated; of `single`: how many records, each edited by itself.
        batch: of `consecutive`: records of one edit.
        asked: of `batch`: ask only the first so many of the records that are edited at once.

    Raises:
        ValueError: for no or non-positive numbers, or what the mode does not take.
    """

    mode: Mode
    edits: list[int]
    batch: int | None = None
    asked: int | None = None

    def __post_init__(self) -> None:
        if not self.edits or min(self.edits) < 1:
            raise ValueError(f"benchmark.runs: edits must be positive numbers, got {self.edits} for mode {self.mode}")
        if (self.mode == "consecutive") != (self.batch is not None) or (self.batch is not None and self.batch < 1):
            raise ValueError(f"benchmark.runs: mode consecutive needs a batch, and no other takes one; got {self}")
        if self.asked is not None and (self.mode != "batch" or self.asked < 1):
            raise ValueError(f"benchmark.runs: asked must be at least 1, and is of mode batch; got {self}")
        self.edits = sorted(set(self.edits))

    @property
    def steps(self) -> int:
        """Records of one edit."""
        return 1 if self.mode in ("single", "sequential") else self.batch or 0


@dataclass
class Benchmark:
    """A grid: every editor on every data set in every run.

    Args:
        datasets: by the names that results are filed under.
        runs: modes and numbers of edits.
        out: the folder of results. What is finished there, of the same editor, weights, records and run, is kept. A
            run that would write over what is finished of others, such as another seed's, is refused.
        workers: processes that take cells; with `device: auto` on GPUs each has one of its own, else all have the
            device that is named. 0: as many as there are GPUs with `device: auto`, else 1.
        answers: of so many records of each cell, generated answers are kept for reading.
        only: run these cells alone, by patterns of their files' names (counterfact/batch-1000/*, */memit); none for an
            empty list. Tables, figures and answers are of all cells that are finished.
    """

    datasets: dict[str, GridDataset]
    runs: list[GridRun]
    out: str = "runs/benchmark"
    workers: int = 0
    answers: int = 10
    only: list[str] | None = None

    def __post_init__(self) -> None:
        if not self.datasets or not self.runs:
            raise ValueError("benchmark needs datasets and runs")
        wrong = [name for name in self.datasets if not re.fullmatch(r"[\w.+-]+", name)]
        if wrong:
            raise ValueError(f"benchmark.datasets: {wrong[0]!r} will name a folder: use letters, digits, _ . + -")
        if min(self.workers, self.answers) < 0:
            raise ValueError(f"benchmark: workers and answers must not be negative, got {self.workers}, {self.answers}")

    def most(self) -> int:
        """The records that the largest run needs."""
        return max(n for run in self.runs for n in run.edits)


@dataclass(frozen=True, eq=False)
class Cell:
    """One editor on one data set in one run.

    Args:
        editor: its name.
        facts: what the editor was made of.
        records: those that are edited.
        about: everything else that the result hangs on, as JSON values.
        judging: how answers are judged; `about` has it too.
        asked: of how many of the records; None: of all.
        queries_per_kind: how many of their queries the records were read with; they themselves tell the key.
        files: hashes of the files that facts and judging name (`datamodules.files.hashes`). Neither they nor
            `overrides` are of the key, since results of before do not tell the files: see `holds`.
        overrides: of the backbone's config, as JSON values.
        batch_size: queries in one forward pass: where they do not fit into memory, fewer do, and what is finished is
            kept, since it changes results by rounding alone.
    """

    dataset: str
    editor: str
    mode: Mode
    edits: tuple[int, ...]
    batch: int
    records: Sequence[EditRecord] = field(repr=False)
    facts: dict[str, Any] = field(repr=False)
    about: dict[str, Any] = field(repr=False)
    judging: Judging = field(default_factory=Judging, repr=False)
    asked: int | None = None
    queries_per_kind: int | None = None
    files: dict[str, str] = field(default_factory=dict, repr=False)
    overrides: dict[str, Any] = field(default_factory=dict, repr=False)
    batch_size: int = BATCH_SIZE

    @property
    def name(self) -> str:
        return f"{self.dataset}, {self.mode} {'/'.join(map(str, self.edits))}, {self.editor}"

    def file(self, out: Path) -> Path:
        return out / "cells" / f"{self.place}.json"

    @property
    def place(self) -> str:
        """The name of its file."""
        return place(self.dataset, self.mode, self.edits, self.batch, self.asked, self.editor)

    def key(self) -> str:
        """A hash of all that the result hangs on."""
        return self.keys[0]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Those that a file of this cell may have: its own, and that of before, which hung on the batch size too. By
        the default size the two are one, so that no result of before is lost."""
        texts = [record.to_json() for record in self.records]
        told = [self.dataset, self.editor, self.mode, self.edits, self.batch, texts, self.facts]
        more = [] if self.asked is None else [self.asked]
        sizes = dict.fromkeys((BATCH_SIZE, self.batch_size))
        every = ([*told, self.about | {"batch_size": size}, *more] for size in sizes)
        return tuple(sha256(json.dumps(one, sort_keys=True).encode()).hexdigest() for one in every)

    @cached_property
    def records_hash(self) -> str:
        """Of the records and all that is asked of them."""
        return sha256(json.dumps([record.to_json() for record in self.records]).encode()).hexdigest()

    def holds(self, found: Mapping[str, Any]) -> bool:
        """Whether what was read from the cell's file is of this setup; what a file does not tell is taken to be."""
        files, backbone = found.get("files", {}), found.get("backbone", {})
        return (
            found["key"] in self.keys
            and all(self.files.get(name) == told for name, told in files.items())
            and backbone.get("overrides", self.overrides) == self.overrides
        )


def place(dataset: str, mode: Mode, edits: Sequence[int], batch: int, asked: int | None, editor: str) -> str:
    """The name of a cell's file: data set/run/editor."""
    run = f"{mode}-{'-'.join(map(str, edits))}" + (f"-by{batch}" if batch > 1 else "")
    run += f"-asked{asked}" if asked is not None else ""
    return f"{dataset}/{run}/{re.sub(r'[^A-Za-z0-9_.+-]+', '_', editor)}"


def refuse_one_place(cells: Sequence[Cell]) -> None:
    """Refuse editors whose names differ only in what no file's name has: one's results would take the other's place.

    Raises:
        ValueError: naming two of them.
    """
    found: dict[str, str] = {}
    for cell in cells:
        if (other := found.setdefault(cell.place, cell.editor)) != cell.editor:
            raise ValueError(f"editors {other!r} and {cell.editor!r} would both write {cell.place}: rename one of them")


def places(benchmark: Benchmark, editors: Sequence[str]) -> list[str]:
    """The names of all cells of some editors, before anything is loaded; among them those of upper bounds in runs that
    have none."""
    return [
        place(name, run.mode, edits, run.steps, run.asked, editor)
        for name in benchmark.datasets
        for run in benchmark.runs
        for _, edits in spans(run)
        for editor in editors
    ]


def check_only(found: Sequence[str], only: Sequence[str] | None) -> None:
    """Refuse a pattern that names no cell.

    Args:
        found: the names of all cells.

    Raises:
        ValueError: for such a pattern; it says how cells are called.
    """
    for pattern in only or ():
        if not any(fnmatch(name, pattern) for name in found):
            raise ValueError(
                f"benchmark.only: no cell is called {pattern!r}; they are called as {found[0]}, and * stands for "
                "any text"
            )


def matching(cells: Sequence[Cell], only: Sequence[str] | None) -> list[Cell]:
    """The cells that some patterns name; all of them without patterns.

    Raises:
        ValueError: for a pattern that names none.
    """
    check_only([cell.place for cell in cells], only)
    return list(cells) if only is None else [c for c in cells if any(fnmatch(c.place, p) for p in only)]


def spans(run: GridRun) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Of each cell of a run: how many records it takes, and the numbers of edits that it is evaluated at."""
    if run.mode in ("sequential", "consecutive"):
        yield run.edits[-1], tuple(run.edits)
    else:
        yield from ((n, (n,)) for n in run.edits)
