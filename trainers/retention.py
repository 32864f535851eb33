"""Consecutive editing by several editors: a progress bar, one JSON file that a later call adds to, one figure.

The report is that of trainers/report.py, filed by the number of edits so far in place of the pool size, and

    curves      by editor, a list with an entry per checkpoint: edits, edit_seconds, seconds_per_edit (of a request: a
                record may hold several), `first` (metrics of the first checkpoint's records alone) and `norms` (L1
                norms of the edited matrices)

A later call does not run the editors again that have reached the last checkpoint.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited
from modules.evaluation import Answers
from modules.modes import Checkpoint, consecutive, stops_of, work
from trainers import earlier
from trainers.drawing.curves import retention
from trainers.editors import Chosen
from trainers.evaluation_run import check
from trainers.made_of import of_evaluation, of_facts
from trainers.progress import bar
from trainers.protocols import Judging
from trainers.report import Report, add_evaluation, add_failure, cells, new_report
from trainers.report_table import print_table
from trainers.written import write_json

log = logging.getLogger(__name__)


def run_consecutive(
    editors: Sequence[Chosen],
    backbone: Backbone,
    records: Sequence[EditRecord],
    batch: int,
    checkpoints: Sequence[int] | None,
    judging: Judging,
    out: Path,
    progress: bool = True,
    data: str = "",
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int = 16,
    console: Console | None = None,
    queries_per_kind: int | None = None,
    available: int | None = None,
) -> Report:
    """Run every editor through all records, batch after batch; write the report, its figure (`out` as .png), the table.

    The file is written anew at each checkpoint. A later call with the same records, weights and settings adds to it and
    keeps the editors that were finished (`trainers.earlier`). One that fails is marked with the reason at the
    checkpoint that it did not reach.

    Args:
        batch, checkpoints: see `modules.modes.consecutive`.
        judging: how answers are judged.
        data, seed, queries_per_kind, available: see `trainers.report.new_report`.
        batch_size, max_new_tokens: see `Judging.judge`.

    Raises:
        ValueError: for no editors or records, a batch or checkpoint below 1, two editors of one name, a record that
            the protocol cannot judge, or a file of another setup.
    """
    check([c.editor for c in editors], records, checkpoints or [1])
    judging.check(records)
    stops = stops_of(len(records), batch, checkpoints)
    console = console or Console()
    judge = judging.judge(Answers(Edited(backbone)), batch_size, max_new_tokens)
    mode = "sequential" if batch == 1 else "consecutive"
    report = new_report(
        backbone,
        records,
        stops,
        data,
        seed,
        mode=mode,
        protocols=judge.definitions,
        protocol=judge.name,
        queries_per_kind=queries_per_kind,
        available=available,
    ) | {"curves": {}, "made_of": {}}
    # asked now: once the editors have run, a folder may hold another one
    made_of = {c.editor.name: of_facts(c.facts) for c in editors}
    how = {"mode": mode, "batch": batch, "checkpoints": stops, "seed": seed}
    report["meta"] |= {"batch": batch, "setup": of_evaluation(backbone, records, judging, judge, **how)}
    _go_on(report, out, made_of, console)
    left = [c for c in editors if c.editor.name not in _finished(report)]
    with bar(console, enabled=progress) as shown:
        task = shown.add_task("", total=work(len(records), batch, checkpoints) * len(left))
        for i, chosen in enumerate(left):
            shown.update(task, description=chosen.editor.name)
            at = _At(report, chosen.editor.name, made_of[chosen.editor.name], out, shown, task)
            try:
                consecutive(
                    chosen.editor,
                    backbone,
                    records,
                    batch,
                    stops,
                    judge,
                    seed,
                    progress=lambda n: shown.advance(task, n),
                    at_checkpoint=at,
                )
            except Exception as error:  # whatever one editor does, the others' hours of work go on
                name = chosen.editor.name
                log.debug("%s failed", name, exc_info=True)
                missed = next(stop for stop in stops if str(stop) not in report["aggregate"].get(name, {}))
                add_failure(report, name, missed, f"{type(error).__name__}: {error}")
            shown.update(task, completed=work(len(records), batch, checkpoints) * (i + 1))
            write_json(out, report)
    write_json(out, report)  # also where nothing was left to run
    if any(report["curves"].values()):
        retention(report).savefig(out.with_suffix(".png"))
    print_table(report, console)
    console.print(f"Pool: records edited so far, {batch} at a time.\nwritten to {out}", highlight=False, soft_wrap=True)
    return report


class _At:
    """What is done at each checkpoint of one editor."""

    def __init__(
        self, report: Report, name: str, made_of: dict[str, Any], out: Path, shown: Progress, task: Any
    ) -> None:
        self.report, self.name, self.made_of, self.out, self.shown, self.task = report, name, made_of, out, shown, task
        self.begun = False

    def __call__(self, reached: Checkpoint) -> None:
        if not self.begun:
            for part in ("aggregate", "runs", "records", "curves"):  # of an earlier try
                self.report[part].pop(self.name, None)
            self.begun = True
        self.report["made_of"][self.name] = self.made_of
        add_evaluation(self.report, reached.evaluation)
        edits, seconds = reached.evaluation.pool_size, reached.evaluation.edit_seconds
        point = {
            "edits": edits,
            "edit_seconds": seconds,
            "seconds_per_edit": seconds / reached.evaluation.settings["requests"],
            "first": {metric: cell["value"] for metric, cell in reached.first.items()},
            "norms": {name: norms._asdict() for name, norms in reached.norms.items()},
        }
        self.report["curves"].setdefault(self.name, []).append(point)
        self.shown.update(self.task, description=f"{self.name}, {edits} edits")
        write_json(self.out, self.report)


def _go_on(report: Report, out: Path, made_of: Mapping[str, dict[str, Any]], console: Console) -> None:
    """Put into a new report what an earlier one holds. Editors that are asked for and were not finished begin again,
    since their edits are gone; the checkpoints that they had reached stay until they reach the first one again."""
    old = earlier.read(out, report["meta"]["setup"], made_of)
    if old is None:
        return
    earlier.take(report, old, {(name, size) for name, size, cell in cells(old) if name in made_of and "error" in cell})
    for part in ("curves", "made_of"):
        report[part] |= old[part]
    report["meta"]["earlier"] = earlier.calls(old)
    named = [name for name in _finished(old) if name in made_of], [name for name in old["runs"] if name not in made_of]
    codes = [run.get("code") for sizes in report["runs"].values() for run in sizes.values()]
    earlier.tell(console, out, *named, codes=codes)


def _finished(report: Report) -> list[str]:
    """The editors that have reached all checkpoints."""
    stops = {str(stop) for stop in report["meta"]["pool_sizes"]}
    return [name for name, sizes in report["runs"].items() if stops <= sizes.keys()]
