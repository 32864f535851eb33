"""Consecutive editing by several editors: a progress bar, one JSON file that a later call goes on from, one figure.

The report is that of trainers/report.py, filed by the number of edits so far in place of the pool size, and

    curves      by editor, a list with an entry per checkpoint: edits, edit_seconds, seconds_per_edit (of a request: a
                record may hold several), `first` (metrics of the first checkpoint's records alone) and `norms` (L1
                norms of the edited matrices)
    finished    by editor, what it was made of; one that stands here is not run again by a later call
"""

import json
import logging
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited
from modules.evaluation import Answers
from modules.fingerprint import weights_hash
from modules.modes import Checkpoint, consecutive, stops_of, work
from trainers.callbacks.curves import retention
from trainers.editors import Chosen
from trainers.evaluation_run import bar, check
from trainers.protocols import Judging
from trainers.report import Report, add_evaluation, add_failure, new_report
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
) -> Report:
    """Run every editor through all records, batch after batch; write the report, its figure (`out` as .png), the table.

    The file is written anew at each checkpoint. A later call with the same records, weights and settings keeps the
    editors that were finished. One that fails is marked with the reason at the checkpoint that it did not reach.

    Args:
        batch, checkpoints: see `modules.modes.consecutive`.
        judging: how answers are judged.
        data, seed, queries_per_kind: see `trainers.report.new_report`.
        batch_size, max_new_tokens: see `Judging.judge`.

    Raises:
        ValueError: for no editors or records, a batch or checkpoint below 1, two editors of one name, or a record that
            the protocol cannot judge.
    """
    check([c.editor for c in editors], records, checkpoints or [1])
    judging.check(records)
    stops = stops_of(len(records), batch, checkpoints)
    console = console or Console()
    judge = judging.judge(Answers(Edited(backbone)), batch_size, max_new_tokens)
    mode = "sequential" if batch == 1 else "consecutive"
    fresh = new_report(
        backbone,
        records,
        stops,
        data,
        seed,
        mode=mode,
        protocols=judge.definitions,
        protocol=judge.name,
        queries_per_kind=queries_per_kind,
    ) | {"curves": {}, "finished": {}}
    texts = [record.to_json() for record in records]
    told = json.dumps([texts, batch, stops, judge.name, judge.options(), seed, weights_hash(backbone.model)])
    fresh["meta"] |= {"batch": batch, "setup": sha256(told.encode()).hexdigest()}
    report = _continued(out, fresh, editors)
    left = [c for c in editors if c.editor.name not in report["finished"]]
    if len(left) < len(editors):
        console.print(f"kept from {out}: {', '.join(report['finished'])}", highlight=False, soft_wrap=True)
    with bar(console, enabled=progress) as shown:
        task = shown.add_task("", total=work(len(records), batch, checkpoints) * len(left))
        for i, chosen in enumerate(left):
            shown.update(task, description=chosen.editor.name)
            at = _At(report, chosen, out, shown, task)
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
            else:
                report["finished"][chosen.editor.name] = chosen.facts
            shown.update(task, completed=work(len(records), batch, checkpoints) * (i + 1))
            write_json(out, report)
    if any(report["curves"].values()):
        retention(report).savefig(out.with_suffix(".png"))
    print_table(report, console)
    console.print(f"Pool: records edited so far, {batch} at a time.\nwritten to {out}", highlight=False, soft_wrap=True)
    return report


class _At:
    """What is done at each checkpoint of one editor."""

    def __init__(self, report: Report, chosen: Chosen, out: Path, shown: Progress, task: Any) -> None:
        self.report, self.name, self.out, self.shown, self.task = report, chosen.editor.name, out, shown, task

    def __call__(self, reached: Checkpoint) -> None:
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


def _continued(out: Path, fresh: Report, editors: Sequence[Chosen]) -> Report:
    """A new report, with what an earlier one of the same setup holds of editors that it had finished."""
    facts = {c.editor.name: c.facts for c in editors}  # asked now: once they have run, a folder may hold another one
    try:
        old = json.loads(out.read_text(encoding="utf-8"))
        same = old["meta"]["setup"] == fresh["meta"]["setup"]
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another kind
        return fresh
    for chosen in editors:
        name = chosen.editor.name
        if same and old["finished"].get(name) == facts[name]:
            for part in ("aggregate", "runs", "records", "curves", "finished"):
                fresh[part][name] = old[part][name]
    return fresh
