"""Evaluate several editors at several pool sizes: a progress bar, one JSON file, one table."""

import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, fewer_queries
from modules.judging import evaluate_pools, split_pools
from modules.protocols.conditions import have_conditions, without_failed_conditions
from trainers.protocols import Judging
from trainers.report import Report, add_evaluation, add_failure, new_report
from trainers.report_table import print_table
from trainers.written import write_json

log = logging.getLogger(__name__)


def run_evaluation(
    editors: Sequence[Editor],
    backbone: Backbone,
    records: Sequence[EditRecord],
    pool_sizes: Sequence[int],
    judging: Judging,
    out: Path,
    progress: bool = True,
    data: str = "",
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    singles: int | None = None,
    console: Console | None = None,
    mode: str = "batch",
    asked: int | None = None,
    queries_per_kind: int | None = None,
) -> Report:
    """Evaluate every editor at every pool size, write the report to `out`, print the table.

    The file is written anew after each editor and pool size, so a run that is stopped keeps what it has. An editor that
    fails at one pool size (in-context learning beyond the context window) is marked there with the reason, and the run
    goes on; `trainers.report.failures` lists the marks. Pool sizes above the number of records become that number.

    Args:
        judging: how answers are judged.
        data, seed, mode, queries_per_kind: see `trainers.report.new_report`.
        batch_size, max_new_tokens: see `Judging.judge`.
        singles: at pool size 1, where each record is a pool of its own, take only so many records.
        asked: see `modules.judging.evaluate_pools`.

    An editor that does not read the pool (`reads_pool`) is evaluated at the largest size only.

    Raises:
        ValueError: for no editors, records or pool sizes, a pool size below 1, two editors of one name, or a record
            that the protocol cannot judge.
    """
    check(editors, records, pool_sizes)
    judging.check(records)
    sizes = sorted({min(size, len(records)) for size in pool_sizes})
    if sizes != sorted(set(pool_sizes)):
        log.warning("pool sizes %s become %s: there are %d records", list(pool_sizes), sizes, len(records))
    console = console or Console()
    judge = judging.judge(Answers(Edited(backbone)), batch_size, max_new_tokens)
    report = new_report(
        backbone,
        records,
        sizes,
        data,
        seed,
        mode=mode,
        protocols=judge.definitions,
        protocol=judge.name,
        queries_per_kind=queries_per_kind,
    )
    of_size = {size: records[:singles] if size == 1 and singles else records for size in sizes}
    work = {size: len(of) - split_pools(of, size)[1] for size, of in of_size.items()}
    plan = [(editor, size) for editor in editors for size in (sizes if editor.reads_pool else sizes[-1:])]
    with bar(console, enabled=progress) as shown:
        task = shown.add_task("", total=sum(work[size] for _, size in plan))
        ends = 0
        for editor, size in plan:
            shown.update(task, description=f"{editor.name}, {size} edits")
            ends += work[size]
            try:
                evaluation = evaluate_pools(
                    judge,
                    editor,
                    backbone,
                    of_size[size],
                    size,
                    seed=seed,
                    progress=lambda n: shown.advance(task, n),
                    asked=asked,
                )
            except Exception as error:  # whatever one editor does, the others' hours of work go on
                log.debug("%s failed with pools of %d", editor.name, size, exc_info=True)
                add_failure(report, editor.name, size, f"{type(error).__name__}: {error}")
            else:
                add_evaluation(report, evaluation)
            shown.update(task, completed=ends)
            write_json(out, report)
    print_table(report, console)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return report


def drawn(
    records: Callable[[Sequence[int]], list[EditRecord]],
    there_are: int,
    count: int,
    seed: int,
    queries_per_kind: int | None = None,
) -> list[EditRecord]:
    """The records that an evaluation is on: `count` of all, or all where there are fewer. More of them begin with the
    same ones.

    Args:
        records: gives those at some places.
        seed: draws the records and their queries.
        queries_per_kind: keep only so many rephrases, and locality and portability queries of each kind, of a record.

    Raises:
        ValueError: for a `queries_per_kind` below 1.
    """
    chosen = records(random.Random(seed).sample(range(there_are), there_are)[:count])  # a sample of few is of others
    return chosen if queries_per_kind is None else [fewer_queries(r, queries_per_kind, seed) for r in chosen]


def meeting_conditions(backbone: Backbone, records: list[EditRecord], batch_size: int = 32) -> list[EditRecord]:
    """Without the questions whose conditions the unedited model does not meet (RippleEdits); most records have none."""
    if not have_conditions(records):
        return records
    kept, lost = without_failed_conditions(Edited(backbone), records, batch_size)
    log.warning("%d questions are left out: the unedited model does not know what they rest on", sum(lost))
    return kept


def check(editors: Sequence[Editor], records: Sequence[EditRecord], pool_sizes: Sequence[int]) -> None:
    """Refuse what cannot be evaluated, before any work."""
    if not editors or not records or not pool_sizes or min(pool_sizes) < 1:
        raise ValueError(
            f"needs editors, records and pool sizes of at least 1; got {len(editors)} editors, {len(records)} records, "
            f"pool sizes {list(pool_sizes)}"
        )
    names = [editor.name for editor in editors]
    if len(set(names)) < len(names):
        raise ValueError(f"editors need different names, since results are filed by name; got {', '.join(names)}")


def bar(console: Console, enabled: bool) -> Progress:
    """A progress bar, where the output is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    return Progress(*columns, console=console, transient=True, disable=not enabled or not console.is_terminal)
