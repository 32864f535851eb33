"""Results as one JSON file.

A report is {"meta", "aggregate", "runs", "records"}; the last three are by editor and then by pool size (as text):
    meta        when, how and on what it was measured, with the definition of every metric; of a run's own evaluation
                also `step`, that of the trained editor
    aggregate   {metric: {value, ci, records}}, or {"error": reason} where the editor failed
    runs        seconds for editing and answering, per query where these were counted, settings, what was left out, and
                a hash of the code that computed it
    records     per-record results in EasyEdit's shape
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.export import versions
from modules.judging import Evaluation
from modules.metrics import PROTOCOLS
from trainers.provenance import command_line, hardware
from trainers.result_cache import code

Report = dict[str, Any]


def new_report(
    backbone: Backbone,
    records: Sequence[EditRecord],
    pool_sizes: Sequence[int],
    data: str = "",
    seed: int = 0,
    command: str | None = None,
    protocols: Mapping[str, str] = PROTOCOLS,
    mode: str = "batch",
    protocol: str = "default",
    queries_per_kind: int | None = None,
    available: int | None = None,
) -> Report:
    """A report without results.

    Args:
        data: what the records are, in words.
        seed: of the data and of the bootstrap.
        command: the command line; this process's own by default.
        protocols: the definition of every metric.
        mode: how the records are edited: single, batch, sequential or consecutive.
        protocol: how answers are judged, by name; figures of two protocols cannot be compared.
        queries_per_kind: how many rephrases, and other queries of each kind, were kept of a record; None: all.
        available: of how many records these were drawn, where it is known.
    """
    meta = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command or command_line(),
        "data": data,
        "records": len(records),
        "edits": sum(len(record.requests) for record in records),
        "mode": mode,
        "protocol": protocol,
        "queries_per_kind": queries_per_kind,
        "pool_sizes": list(pool_sizes),
        "backbone": asdict(backbone.config),
        "seed": seed,
        "versions": versions(),
        "hardware": hardware(backbone.device),
        "protocols": dict(protocols),
    }
    if available is not None:
        meta["records_available"] = available
    return {"meta": meta, "aggregate": {}, "runs": {}, "records": {}}


def add_evaluation(report: Report, evaluation: Evaluation) -> None:
    """Put one editor's results at one pool size into the report."""
    run: dict[str, Any] = {"edit_seconds": evaluation.edit_seconds, "edit_bytes": evaluation.edit_bytes}
    run |= {"answer_seconds": evaluation.answer_seconds, "code": code()}
    queries = evaluation.settings.get("queries")
    if queries and not evaluation.settings.get("fluency"):  # writing takes most of the time, and asks no query
        run["answer_seconds_per_query"] = evaluation.answer_seconds / queries
    _put(report, "aggregate", evaluation.editor, evaluation.pool_size, evaluation.aggregates)
    _put(report, "runs", evaluation.editor, evaluation.pool_size, run | evaluation.settings)
    _put(report, "records", evaluation.editor, evaluation.pool_size, evaluation.records)


def add_failure(report: Report, editor: str, pool_size: int, reason: str) -> None:
    """Mark one editor at one pool size as failed."""
    _put(report, "aggregate", editor, pool_size, {"error": reason})


def failures(report: Report) -> list[tuple[str, int, str]]:
    """(editor, pool size, reason) of every cell that failed."""
    return [(editor, size, cell["error"]) for editor, size, cell in cells(report) if "error" in cell]


def cells(report: Report) -> list[tuple[str, int, dict[str, Any]]]:
    """(editor, pool size, aggregates) in the order in which they came."""
    return [(editor, int(n), cell) for editor, sizes in report["aggregate"].items() for n, cell in sizes.items()]


def _put(report: Report, part: str, editor: str, pool_size: int, value: Any) -> None:
    sizes = report[part].get(editor, {}) | {str(pool_size): value}
    report[part][editor] = dict(sorted(sizes.items(), key=lambda item: int(item[0])))  # a later call may add smaller
