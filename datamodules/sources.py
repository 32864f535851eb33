"""Sources of records as one data set: Arrow on disk, memory-mapped, so that millions of records cost no RAM."""

import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import datasets
from datasets.exceptions import DatasetGenerationError
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import Dataset

from datamodules.files import located
from datamodules.readers import FORMATS, read
from datamodules.readers.errors import DataError, SkippedRecords
from datamodules.readers.hub import PREFIX, commit, is_hub
from datamodules.records import EditRecord
from datamodules.schedule import Place, Slot, stable_hash

_TOLD = "told: "  # begins a last row that is no record but what the reader skipped, said anew at each load
_FEATURES = datasets.Features({"record": datasets.Value("string")})
_SPREAD_ABOVE = 100_000  # records; below, starting processes takes longer than the work


@dataclass
class Source:
    """Where records come from.

    Args:
        format: zsre, counterfact, knowedit, mquake, dune, ripple or uniedit; auto, any of the published files; facts or
            facts_uniedit, generated; pairs, hub or records, your own (`datamodules.readers.FORMATS`).
        path: the file, looked for from the working directory and then below the folder named by the environment
            variable PALIMPSEST_DATA, under this name or with or without a final .gz; `hub:owner/name:split`, or
            `hub:owner/name@revision:split`, on the Hugging Face hub (see `readers.hub`); for "hub" the data set's name;
            none for records that are generated ("facts").
        options: further arguments of the format's reader, such as `split: val` for "facts".
        skip: pass over so many records at the beginning.
        limit: of what follows, take the first records only, this many at most.
        sample: of those, draw so many by `seed`; all of them where they are fewer. The few-shot rows of IBKE draw 512
            from the training set of each further source.
        seed: of that draw.
        weight: how often the mixture draws from this source while it has records left, relative to the other sources.
            Without weights, all records of all sources are shuffled together.
        on_error: what to do at a malformed record: "raise", or "skip" and count.

    Raises:
        ValueError: for an unknown format, a negative skip, or a limit, sample or weight that is not positive.
    """

    format: str
    path: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    weight: float | None = None
    on_error: Literal["raise", "skip"] = "raise"
    sample: int | None = None
    seed: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}; known formats: {', '.join(FORMATS)}")
        if self.skip < 0:
            raise ValueError(f"skip must not be negative, got {self.skip}: {self.name}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1 (or null for all records), got {self.limit}: {self.name}")
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be at least 1 (or null for all records), got {self.sample}: {self.name}")
        if self.weight is not None and not self.weight > 0:
            raise ValueError(f"weight must be positive (leave the source out instead), got {self.weight}: {self.name}")

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.format} {self.path}" if self.path else self.format

    @property
    def commit(self) -> str | None:
        """Of a data set of the hub, where it is known (see `readers.hub.commit`)."""
        if self.path is None or not (self.format == "hub" or is_hub(self.path)):
            return None
        return commit(self.path, self.options.get("revision"))

    def located(self) -> Path | None:
        """The file or folder that is read; None where there is none or it is on the hub.

        Raises:
            FileNotFoundError: names the path and the places where it was looked for.
        """
        if self.path is None or self.format == "hub" or is_hub(self.path):
            return None
        return located(self.path, f" (format {self.format})")


class RecordDataset(Dataset[Slot]):
    """Records by index, source after source. Items are asked for by `Place` (see `PoolSchedule`) and come as `Slot`s.

    Args:
        tables: one for each source, with one column "record": `EditRecord.to_json`.
        weights: the sources' weights in the mixture, if they have any.
    """

    def __init__(self, tables: Sequence[datasets.Dataset], weights: Sequence[float] | None = None) -> None:
        self.tables = list(tables)
        self.weights = weights
        self._rows = self.tables[0] if len(tables) == 1 else datasets.concatenate_datasets(self.tables)

    @property
    def lengths(self) -> list[int]:
        """Records of each source."""
        return [len(table) for table in self.tables]

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> EditRecord:
        return EditRecord.from_json(self._rows[index]["record"])

    def records(self, indices: Sequence[int]) -> list[EditRecord]:
        return [EditRecord.from_json(text) for text in self._rows[list(indices)]["record"]]

    def __getitem__(self, place: Place) -> Slot:
        return Slot(self.record(place.index), place.pool, place.seed)

    def __getitems__(self, places: Sequence[Place]) -> list[Slot]:
        """All slots of a micro-batch in one look-up; `DataLoader` prefers this."""
        records = self.records([p.index for p in places])
        return [Slot(record, place.pool, place.seed) for record, place in zip(records, places, strict=True)]

    def where(self, fits: Callable[[EditRecord], bool], workers: int = 0) -> "RecordDataset":
        """The records for which `fits` is true. The result is cached on disk beside the table where there is one."""
        return RecordDataset([_filtered(table, fits, workers) for table in self.tables], self.weights)


def load(sources: Sequence[Source], cache_dir: str | None = None) -> RecordDataset:
    """Read sources into a data set, from the Arrow cache where the file and the readers have not changed since.

    Args:
        cache_dir: the folder of the cache; Hugging Face's own by default.

    Raises:
        ValueError, FileNotFoundError: see `check_sources`.
        DataError: for a source without records, and for what the readers cannot read.
    """
    check_sources(sources)
    weights = [s.weight for s in sources if s.weight is not None]
    try:
        return RecordDataset([_table(s, cache_dir) for s in sources], weights or None)
    except DataError:
        raise
    except ValueError as error:
        raise DataError(str(error)) from error


def described(sources: Sequence[Source]) -> str:
    """Where records come from, in words, with the commits of what is on the hub."""
    return "; ".join(f"{s.name} at {commit}" if (commit := s.commit) else s.name for s in sources)


def check_sources(sources: Sequence[Source]) -> None:
    """Refuse what is wrong before anything is read.

    Raises:
        ValueError: without a source, or if some but not all have a weight.
        FileNotFoundError: see `Source.located`.
    """
    if not sources:
        raise ValueError("no source is given; name at least one, such as `- format: facts`")
    if 0 < sum(s.weight is not None for s in sources) < len(sources):
        without = ", ".join(s.name for s in sources if s.weight is None)
        raise ValueError(f"give every source a weight, or none; without a weight: {without}")
    for source in sources:
        source.located()


def keep(dataset: RecordDataset, fits: Callable[[EditRecord], bool], what: str, workers: int = 0) -> RecordDataset:
    """Leave out the records for which `fits` is false, and say in one line how many those are.

    Args:
        what: names the data set in messages, such as "train".
        workers: processes for a large data set.

    Raises:
        DataError: if no record is left.
    """
    kept = dataset.where(fits, workers)
    left_out = len(dataset) - len(kept)
    if not len(kept):
        raise DataError(f"all {len(dataset):,} records are longer than the limits ({what}); raise the limits")
    if left_out:
        rank_zero_info(f"left out {left_out:,} of {len(dataset):,} records longer than the limits ({what})")
    return kept


def _table(source: Source, cache_dir: str | None) -> datasets.Dataset:
    path = source.located()
    options = source.options if source.on_error == "raise" else {**source.options, "on_error": source.on_error}
    what = {
        "format": source.format,
        "path": str(path) if path else source.path,
        "options": options,
        "skip": source.skip,
        "limit": source.limit,
        "version": (_state(path) if path else _local_state(source) or source.commit, _code()),
    }
    try:
        # every argument of the generator is a part of the cache's key
        table = datasets.Dataset.from_generator(_rows, features=_FEATURES, cache_dir=cache_dir, gen_kwargs=what)  # type: ignore[arg-type]
    except DatasetGenerationError as error:
        raise error.__cause__ or error from None  # the reader's own error says which record is wrong
    except ValueError as error:
        if "corresponds to no data" not in str(error):
            raise
        skipped = f", skip: {source.skip}" if source.skip else ""
        raise ValueError(f"{source.name}: no records; check its options: {source.options}{skipped}") from None
    if (last := table[-1]["record"]).startswith(_TOLD):
        rank_zero_warn(last.removeprefix(_TOLD))
        table = table.select(range(len(table) - 1))
    if source.sample is not None and source.sample < len(table):
        draw = random.Random(stable_hash("sample", source.seed))
        table = table.select(sorted(draw.sample(range(len(table)), source.sample)))
    return table  # type: ignore[return-value]


def _local_state(source: Source) -> list[tuple[str, int, int]] | None:
    """Of a local folder that stands for a data set's name on the hub; None for one of the hub."""
    name = (source.path or "").removeprefix(PREFIX)
    folder = next((Path(part) for part in (name, name.partition(":")[0]) if part and Path(part).is_dir()), None)
    return _state(folder) if folder else None


def _state(path: Path) -> list[tuple[str, int, int]]:
    """What changes when a file, or any file of a folder, does."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.is_file())
    else:  # with what a reader takes from beside it: DUNE's locality files
        files = [path, *sorted(path.parent.glob(f"{path.name.partition('.')[0]}_locality.json*"))]
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _rows(
    format: str, path: str | None, options: dict[str, Any], skip: int, limit: int | None, version: object
) -> Iterator[dict[str, str]]:
    reader = read(format, path, **options)
    records = islice(reader, skip, None if limit is None else skip + limit)
    told: list[str] = []
    count = 0
    while True:
        with _heard(told):
            record = next(records, None)
        if record is None:
            break
        count += 1
        yield {"record": record.to_json()}
    with _heard(told):  # a limit ends before the reader does, which tells when it is closed
        if hasattr(reader, "close"):
            reader.close()  # type: ignore[attr-defined]
    if told and count:
        yield {"record": _TOLD + "; ".join(told)}


@contextmanager
def _heard(told: list[str]) -> Iterator[None]:
    """Keep what a reader says of records, or questions of theirs, that it left out."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        if issubclass(warning.category, SkippedRecords):
            told.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@cache
def _code() -> str:
    """A hash of the readers' code: a reader that is corrected must not be answered from an old cache."""
    here = Path(__file__).parent
    files = [here / "records.py", *sorted((here / "readers").glob("*.py"))]
    return sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def _filtered(table: datasets.Dataset, fits: Callable[[EditRecord], bool], workers: int) -> datasets.Dataset:
    processes = workers if workers > 1 and len(table) > _SPREAD_ABOVE else None
    told = {"fits": fits, "code": _code_of(fits)}  # arguments are a part of the cache's key
    return table.filter(_row_fits, input_columns=["record"], fn_kwargs=told, num_proc=processes)


def _code_of(fits: Callable[[EditRecord], bool]) -> str:
    """A hash of the project's code that decides what fits: of its module, and of those that this one imports from. By
    itself the cache knows a function by its name alone."""
    own = "datamodules", fits.__module__.partition(".")[0]
    imported = [getattr(value, "__module__", None) or "" for value in vars(sys.modules[fits.__module__]).values()]
    names = sorted({name for name in (fits.__module__, *imported) if name.partition(".")[0] in own})
    files = [file for name in names if (file := getattr(sys.modules.get(name), "__file__", None))]
    return sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


def _row_fits(record: str, fits: Callable[[EditRecord], bool], code: str) -> bool:
    return fits(EditRecord.from_json(record))
