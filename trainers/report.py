"""Results as one JSON file, and as a table for the terminal.

A report is {"meta", "aggregate", "runs", "records"}; the last three are by editor and then by pool size (as text):
    meta        when, how and on what it was measured, with the definition of every metric
    aggregate   {metric: {value, ci, records}}, or {"error": reason} where the editor failed
    runs        seconds for editing and answering, per query where these were counted, settings, and what was left out
    records     per-record results in EasyEdit's shape
"""

import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from datamodules.readers.uniedit import GENERALITY, LOCALITY
from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.counterfact import COUNTERFACT
from modules.export import versions
from modules.fluency import CONSISTENCY, FLUENCY
from modules.judging import Evaluation
from modules.metrics import PROTOCOLS, from_file
from modules.zsre import ZSRE

Report = dict[str, Any]

# metric, title, short title where the exact matches stand beside it
COLUMNS = (
    ("reliability/token_accuracy", "Reliability", "Rel."),
    ("generality/token_accuracy", "Generality", "Gen."),
    ("locality/token_agreement", "Locality", "Loc."),
    ("portability/token_accuracy", "Portability", "Port."),
    ("multi_hop/token_accuracy_max", "Multi-hop", "Hops"),
    ("reliability/exact_match", "Rel. EM", "Rel. EM"),
    ("generality/exact_match", "Gen. EM", "Gen. EM"),
    ("locality/exact_match", "Loc. EM", "Loc. EM"),
    ("portability/exact_match", "Port. EM", "Port. EM"),
    ("multi_hop/exact_match", "Hops EM", "Hops EM"),
    ("generality/uniedit_top_5", "Generality", "Gen."),
    ("locality/uniedit_top_5", "Locality", "Loc."),
    ("portability/uniedit_top_5", "Portability", "Port."),
    ("multi_hop/uniedit_top_5", "Multi-hop", "Hops"),
    ("reliability/mquake_edit_wise", "Edit-wise", ""),
    ("single_hop/mquake_instance_wise", "Instance-wise", ""),
    ("multi_hop/mquake_accuracy", "Multi-hop answers", ""),
    ("portability/dune_accuracy", "Accuracy", ""),
    ("portability/dune_stereotyped", "Stereotyped", ""),
    ("locality/dune_agreement", "Agreement", ""),
    ("locality/dune_accuracy", "Locality accuracy", ""),
    *((name, name.removeprefix("counterfact/"), "") for name in COUNTERFACT.definitions),
    (FLUENCY, "GE", ""),
    (CONSISTENCY, "RS", ""),
    *((name, name.removeprefix("zsre/").capitalize(), "") for name in ZSRE.definitions),
)
# by appendix J of DistillMIKE the magnitudes are no measure of quality; of stereotyped answers fewer are better; texts
# are to stay as fluent as the unedited model's
UNRANKED = ("portability/dune_stereotyped", "counterfact/EM", "counterfact/PM", "counterfact/NM", FLUENCY)
# facts of a run that stand beside the metrics of the published protocols: key, title, digits
COSTS = (("answer_seconds_per_query", "Seconds", 3), ("context_tokens", "Context", 1))
CRITERIA = (  # a table of its own
    *((f"generality/{name}/uniedit_top_5", name) for name in GENERALITY),
    *((f"locality/{name}/uniedit_top_5", name) for name in LOCALITY if name not in GENERALITY),
)
LEGEND = (
    "Percent, means over records; pool: records edited at once. Teacher-forced token accuracy; locality: agreement "
    "with the unedited model; multi-hop: best question and alias."
)
UNIEDIT_LEGEND = (
    "Percent, means over records; pool: records edited at once. UniEdit's protocol: reliability is teacher-forced "
    "token accuracy; generality counts target tokens in the top 5, with unknown hops edited in (Rep rephrase, MH "
    "multi-hop, RR relation reversal, SER same entity, SA and OA subject and object alias); locality the unedited "
    "model's tokens in the top 5 (SS, RS, OS subject, relation, object specificity, 1-NF 1-N forgotten)."
)
COUNTERFACT_LEGEND = (
    "Percent, means over records; pool: records edited at once. CounterFact's protocol: ES, PS and NS are the share of "
    "prompts, rephrases and neighbours at which the wanted target is the likelier of two, EM, PM and NM by how much, S "
    "the harmonic mean of ES, PS and NS."
)
FLUENCY_LEGEND = (
    " GE: entropy of the bigrams and trigrams of greedy texts, in hundredths of bits; what repeats itself is low, the "
    "unedited model's is what to keep."
)
CONSISTENCY_LEGEND = " RS: TF-IDF cosine of these texts and of reference texts about the new target."
NO_REFERENCES = " RS was not measured: no --references (ROME's attribute_snippets.json) were given."
ZSRE_LEGEND = (
    "Percent, means over records; pool: records edited at once. zsRE's protocol: teacher-forced token accuracy at the "
    "edits' questions, their rephrasings, and unrelated questions with their gold answers; score: the harmonic mean."
)
MQUAKE_LEGEND = (
    "Percent, means over cases; pool: cases edited at once. MQuAKE's protocol: whole greedy answers, to the edits' own "
    "prompts, to all facts of the chain, and to any of three multi-hop questions after demonstrations; multi-hop: "
    "InComeS's token accuracy of the best question and alias."
)
DUNE_LEGEND = (
    "Percent, means over records; pool: records edited at once. DUNE's protocol: the letter, number, yes or no, "
    "or name read out of a greedy answer; stereotyped: fewer is better; agreement: with the unedited model's answers."
)
COSTS_LEGEND = " Seconds: of answering, a query (in batches); context: tokens that the method puts before a query."
EXACT_LEGEND = " EM: exact match of the greedy answer."


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
    return {"meta": meta, "aggregate": {}, "runs": {}, "records": {}}


def add_evaluation(report: Report, evaluation: Evaluation) -> None:
    """Put one editor's results at one pool size into the report."""
    run: dict[str, Any] = {"edit_seconds": evaluation.edit_seconds, "edit_bytes": evaluation.edit_bytes}
    run |= {"answer_seconds": evaluation.answer_seconds}
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
    return [(editor, size, cell["error"]) for editor, size, cell in _cells(report) if "error" in cell]


def write_json(path: Path, report: Report) -> None:
    """Write the report so that the file is whole at any time. JSON has no NaN and no infinity: null stands for them,
    with a warning (`modules.metrics.from_file` reads it)."""
    try:
        text = json.dumps(report, ensure_ascii=False, allow_nan=False)
    except ValueError:  # one number must not end hours of work
        found: list[str] = []
        text = json.dumps(_finite(report, "", found), ensure_ascii=False, allow_nan=False)
        rank_zero_warn(
            f"{path}: null stands for {len(found)} numbers that are NaN or infinite, the first is {found[0]}"
        )
    write_text(path, text + "\n")


def _finite(value: Any, place: str, found: list[str]) -> Any:
    """JSON values with None for numbers that are none, whose places are added to `found`."""
    if isinstance(value, Mapping):
        return {key: _finite(of, f"{place}/{key}", found) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(of, f"{place}/{i}", found) for i, of in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        found.append(place.removeprefix("/"))
        return None
    return value


def check_file(path: Path, flag: str = "") -> None:
    """Make the folder of a file that is to be written, and refuse what cannot be one.

    Args:
        flag: what a user set it by, for the message.

    Raises:
        ValueError: for a folder, and where none can be made for the file or written to.
    """
    said = f"{flag} {path}".strip()
    if path.is_dir():
        raise ValueError(f"{said} is a folder; give a file in it, such as {path / 'results.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=path.parent):
            return
    except OSError as error:
        raise ValueError(f"{said} cannot be written: {error.strerror}; give another file") from error


def check_folder(path: Path, flag: str) -> None:
    """Refuse what cannot be a folder that is written to. Nothing is made yet.

    Args:
        flag: what a user set it by, for the message.

    Raises:
        ValueError: where it, or what it would lie in, is a file or cannot be written to.
    """
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"{flag} {path} cannot be made: {there} is a file; give another folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{flag} {path} cannot be written: {there} allows it not; give another folder")


def write_text(path: Path, text: str) -> None:
    """Write a file that is whole at any time: to a temporary file beside it, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    temporary.chmod(0o644)
    temporary.replace(path)


def print_table(report: Report, console: Console | None = None) -> None:
    """Print the table, its legend and the failures. Where the output is no terminal, rich leaves out all styling."""
    console = console or Console()
    for columns in _tables(report):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("Editor", overflow="fold")
        table.add_column("Pool", justify="right", no_wrap=True)
        for _, title in columns:
            table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
        for editor, size, values in _rows(report, columns):
            table.add_row(editor, str(size), *(Text(text, style="bold" if best else "") for text, best in values))
        console.print(table)
    console.print(_legend(report), style="dim", highlight=False)
    for note in contradictions(report["runs"]):
        console.print(note, highlight=False)
    for editor, size, reason in failures(report):
        console.print(Text(f"{editor} failed with pools of {size}: {reason}", style="red"))


def contradictions(runs: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """How many cases contradict one another, and what is not asked of them, a line for each number of edits; likewise
    how many edits conflict.

    Args:
        runs: settings by editor and then by the number of records edited together, as a report's.
    """
    found: dict[int, tuple[int, int, bool]] = {}
    edited = {size: max(_edited(of[size]) for of in runs.values() if size in of) for of in runs.values() for size in of}
    conflicts: dict[int, tuple[int, int]] = {}
    for sizes in runs.values():
        for size, run in sizes.items():
            if against := run.get("records_contradicted"):
                whole = run.get("protocol") == "mquake" and not run.get("conflicts")
                found[int(size)] = against, edited[size], whole
            if count := run.get("conflicting_edits"):
                conflicts[int(size)] = count, edited[size]
    return [
        f"{against} of {count} cases, {size} edited together, rest on a fact that another one's edit changes: "
        + ("they are not asked." if whole else "their multi-hop questions are not asked.")
        for size, (against, count, whole) in sorted(found.items())
    ] + [
        f"{count} of {edited} records, {size} edited together, edit a prompt that another one edits to something else: "
        "at most one of these edits can hold."
        for size, (count, edited) in sorted(conflicts.items())
    ]


def _edited(run: Mapping[str, Any]) -> int:
    """How many records were edited; an upper bound edits those alone that it asks. Files of before this was counted
    have the records asked."""
    whole = run.get("protocol") == "mquake" and not run.get("conflicts")
    asked = run.get("records", 0) + (run.get("records_contradicted", 0) if whole else 0)
    return run.get("edited", asked)


def _rows(report: Report, columns: Sequence[tuple[str, str]]) -> list[tuple[str, int, list[tuple[str, bool]]]]:
    """(editor, pool size, [(text, is the best at this pool size)]) in the report's order."""
    best: dict[tuple[int, str], float] = {}
    for editor, size, cell in _cells(report):
        for metric, _ in columns:
            if metric in cell and metric not in UNRANKED and not _is_reference(report, editor, size):
                value = round(from_file(cell[metric]["value"]), 3)  # as shown: equal figures are equally good
                best[size, metric] = max(best.get((size, metric), 0.0), value)  # the first, where the second is NaN
    digits = {key: places for key, _, places in COSTS}
    rows = []
    for editor, size, cell in _cells(report):
        values: list[tuple[str, bool]] = []
        run = report["runs"].get(editor, {}).get(str(size), {})
        for metric, _ in columns:
            if metric in digits:
                values.append((f"{run[metric]:.{digits[metric]}f}" if metric in run else "-", False))
                continue
            value = round(from_file(cell[metric]["value"]), 3) if metric in cell else None
            top = bool(value) and value == best.get((size, metric)) and not _is_reference(report, editor, size)
            values.append(("-", False) if value is None else (f"{100 * value:.1f}", top))
        rows.append((editor, size, values))
    return rows


def _is_reference(report: Report, editor: str, size: int) -> bool:
    """The unedited model and upper bounds are there to compare with, not to win."""
    return editor == "unedited" or report["runs"].get(editor, {}).get(str(size), {}).get("own_edit_only", False)


def _tables(report: Report) -> list[list[tuple[str, str]]]:
    """The columns (metric, title) of the table, and of UniEdit's table of criteria where there is one."""
    present = {metric for _, _, cell in _cells(report) for metric in cell}
    exact = any(metric.endswith("/exact_match") for metric in present)
    main = [(metric, short if exact else title) for metric, title, short in COLUMNS if metric in present]
    criteria = [(metric, title) for metric, title in CRITERIA if metric in present]
    if any(metric in (COUNTERFACT.score, ZSRE.score) for metric, _ in main):
        told = {key for sizes in report["runs"].values() for run in sizes.values() for key in run}
        main += [(key, title) for key, title, _ in COSTS if key in told]
    return [main, criteria] if criteria else [main]


def _legend(report: Report) -> str:
    metrics = [metric for columns in _tables(report) for metric, _ in columns]
    if any("/uniedit_top_" in metric for metric in metrics):
        return UNIEDIT_LEGEND
    if COUNTERFACT.score in metrics:
        about_rs = CONSISTENCY_LEGEND if CONSISTENCY in metrics else NO_REFERENCES
        return COUNTERFACT_LEGEND + COSTS_LEGEND + (FLUENCY_LEGEND + about_rs if FLUENCY in metrics else "")
    if ZSRE.score in metrics:
        return ZSRE_LEGEND + COSTS_LEGEND
    if any("/mquake_" in metric for metric in metrics):
        return MQUAKE_LEGEND
    if any("/dune_" in metric for metric in metrics):
        return DUNE_LEGEND
    return LEGEND + (EXACT_LEGEND if any(metric.endswith("/exact_match") for metric in metrics) else "")


def _cells(report: Report) -> list[tuple[str, int, dict[str, Any]]]:
    return [(editor, int(n), cell) for editor, sizes in report["aggregate"].items() for n, cell in sizes.items()]


def _put(report: Report, part: str, editor: str, pool_size: int, value: Any) -> None:
    report[part].setdefault(editor, {})[str(pool_size)] = value


def command_line() -> str:
    """This process's command, with `python -m MODULE` where it was started that way."""
    module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    start = ["python", "-m", module.removesuffix(".__main__")] if module else ["python", Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def hardware(device: torch.device) -> str:
    """The name of a device, for seconds that mean something: a GPU's, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, platform.machine())}, {threads} thread{'s' * (threads > 1)}"
