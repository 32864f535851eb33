"""Evaluate several editors at several pool sizes: a progress bar, a JSON file that a later call adds to, a table."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers
from modules.judging import evaluate_pools, split_pools
from trainers import earlier
from trainers.editors import Chosen
from trainers.made_of import of_evaluation, of_facts
from trainers.progress import bar
from trainers.protocols import Judging
from trainers.report import Report, add_evaluation, add_failure, cells, new_report
from trainers.report_table import print_table
from trainers.written import write_json

log = logging.getLogger(__name__)


def run_evaluation(
    editors: Sequence[Chosen],
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
    available: int | None = None,
) -> Report:
    """Evaluate every editor at every pool size, write the report to `out`, print the table.

    The file is written anew after each editor and pool size, and a later call of the same setup goes on from it and
    adds to it (`trainers.earlier`), so a run that is stopped loses nothing. An editor that fails at one pool size
    (in-context learning beyond the context window) is marked there with the reason, the run goes on, and a later call
    tries it again; `trainers.report.failures` lists the marks. Pool sizes above the number of records become that
    number.

    Args:
        judging: how answers are judged.
        data, seed, mode, queries_per_kind, available: see `trainers.report.new_report`.
        batch_size, max_new_tokens: see `Judging.judge`.
        singles: at pool size 1, where each record is a pool of its own, take only so many records.
        asked: see `modules.judging.evaluate_pools`.

    An editor that does not read the pool (`reads_pool`) is evaluated at the largest size only.

    Raises:
        ValueError: for no editors, records or pool sizes, a pool size below 1, two editors of one name, a record
            that the protocol cannot judge, or a file of another setup.
    """
    check([c.editor for c in editors], records, pool_sizes)
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
        available=available,
    ) | {"made_of": {}}
    # asked now: once the editors have run, a folder may hold another one
    made_of = {c.editor.name: of_facts(c.facts) for c in editors}
    how = {"mode": mode, "seed": seed, "singles": singles, "asked": asked}
    report["meta"]["setup"] = of_evaluation(backbone, records, judging, judge, **how)
    of_size = {size: records[:singles] if size == 1 and singles else records for size in sizes}
    work = {size: len(of) - split_pools(of, size)[1] for size, of in of_size.items()}
    plan = [(c.editor, size) for c in editors for size in (sizes if c.editor.reads_pool else sizes[-1:])]
    plan = _left(plan, report, out, made_of, console)
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
                report["made_of"][editor.name] = made_of[editor.name]
                add_evaluation(report, evaluation)
            shown.update(task, completed=ends)
            write_json(out, report)
    write_json(out, report)  # also where nothing was left to run
    print_table(report, console)
    console.print(f"written to {out}", highlight=False, soft_wrap=True)
    return report


def _left(
    plan: Sequence[tuple[Editor, int]],
    report: Report,
    out: Path,
    made_of: Mapping[str, dict[str, Any]],
    console: Console,
) -> list[tuple[Editor, int]]:
    """What of a plan an earlier call has not finished; what the file holds besides is put into the report."""
    old = earlier.read(out, report["meta"]["setup"], made_of)
    if old is None:
        return list(plan)
    done = {(name, size): old["runs"][name][str(size)] for name, size, cell in cells(old) if "error" not in cell}
    asked = {(editor.name, size) for editor, size in plan}
    earlier.take(report, old, asked - done.keys())
    report["made_of"] |= old["made_of"]
    meta = report["meta"]
    meta["pool_sizes"] = sorted({*meta["pool_sizes"], *old["meta"]["pool_sizes"]})
    meta["earlier"] = earlier.calls(old)
    named = [[f"{name} at {size}" for name, size in done if ((name, size) in asked) == own] for own in (True, False)]
    earlier.tell(console, out, *named, codes=[run.get("code") for run in done.values()])
    return [(editor, size) for editor, size in plan if (editor.name, size) not in done]


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
