"""Compare editors record by record: `python -m trainers.compare a.json b.json [c.json ...] [--allow mode]`.

The files are what trainers.evaluate writes, and cells of a benchmark. Differences are to the first editor of the first
file, over the records that both have, with a paired bootstrap: records are drawn, and both editors are taken at them.
What is not alike is refused, unless it is allowed by name; figures of two protocols are never compared.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import numpy as np

from modules.fluency import FLUENCY
from trainers.columns import COLUMNS
from trainers.command import run
from trainers.markdown import markdown_table
from trainers.protocols import MEASURES, Measures
from trainers.result_files import Entry, common, differing, pairs, read
from trainers.written import write_text

ALLOWED = ("mode", "batch", "edits", "backbone")


def compare(
    files: list[str],
    reference: str | None = None,
    edits: list[int] | None = None,
    metrics: list[str] | None = None,
    allow: list[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    out: str | None = None,
) -> str:
    """Compare results: a table of metric by editor, with differences and their paired bootstrap intervals.

    Args:
        files: reports and benchmark cells, before all options; the first one has the reference.
        reference: the editor of the first file that the others are compared with; by default its first one.
        edits: only these numbers of edits.
        metrics: by name; by default the main ones of the protocol.
        allow: fields that may differ: mode, batch, edits, backbone (another model, or the same one loaded
            otherwise). The table then says so.
        seed: of the bootstrap.
        resamples: of the bootstrap.
        out: a file for the table, in Markdown.

    Raises:
        FileNotFoundError, ValueError: for a file that is not there or holds no results, and for what differs; the field
            and both values are named.
    """
    wrong = sorted(set(allow or ()) - set(ALLOWED))
    if wrong:
        raise ValueError(f"--allow {wrong[0]}: only {', '.join(ALLOWED)} may differ")
    if resamples < 1:
        raise ValueError(f"--resamples must be at least 1, got {resamples}")
    entries = [entry for file in dict.fromkeys(files) for entry in read(Path(file), edits)]
    if not entries:
        raise ValueError("give the files to compare: python -m trainers.compare a.json b.json")
    name = reference or entries[0].editor
    first = [entry for entry in entries if (entry.file, entry.editor) == (entries[0].file, name)]
    if not first:
        known = dict.fromkeys(entry.editor for entry in entries if entry.file == entries[0].file)
        raise ValueError(f"--reference {name!r} is not in {entries[0].file}; there are: {', '.join(known)}")
    others = [entry for entry in entries if entry not in first]
    if not others:
        raise ValueError(f"{entries[0].file} has {name} alone; give a second file, or one with several editors")
    notes = [note for other in others for note in differing(first[0], other, allow or (), metrics)]
    parts = []
    for base, of in pairs(first, others, "edits" in (allow or ())):
        parts.append(_table(base, of, metrics, seed, resamples))
    text = "\n\n".join([*parts, *dict.fromkeys(notes)]) + "\n"
    print(text)
    if out:
        write_text(Path(out), text)
    return text


def difference(one: np.ndarray, other: np.ndarray, seed: int = 0, resamples: int = 1000) -> tuple[float, float, float]:
    """Of a metric: other - one, and the ends of its 95% interval by the paired percentile bootstrap over records.

    Args:
        one, other: [records, parts] (see `Measures.of`), the same record in the same row.
    """
    draw = np.random.default_rng(seed)
    rows = (draw.integers(len(one), size=len(one)) for _ in range(resamples))
    low, high = np.quantile([Measures.of(other[at]) - Measures.of(one[at]) for at in rows], (0.025, 0.975))
    return Measures.of(other) - Measures.of(one), float(low), float(high)


def _table(base: Entry, others: Sequence[Entry], metrics: Sequence[str] | None, seed: int, resamples: int) -> str:
    measured = MEASURES[base.told["protocol"]]
    columns = _columns(measured, [base, *others], metrics)
    heads = ["Editor", *(title for _, title in columns)]
    own = {name: measured.values(result["post"]) for name, result in base.results.items()}
    notes = []
    rows = [[_name(base, others), *(_value(measured, metric, list(own.values())) for metric, _ in columns)]]
    for other in others:
        ids = common(base, other)
        theirs = {name: measured.values(other.results[name]["post"]) for name in ids}
        cells = []
        for metric, _ in columns:
            parts = measured.parts(metric)
            both = [n for n in ids if all(p in own[n] and p in theirs[n] for p in parts)]
            if not both:
                cells.append("-")
                continue
            a, b = (np.array([[of[n][p] for p in parts] for n in both]) for of in (own, theirs))
            gap, low, high = (100 * x for x in difference(a, b, seed, resamples))
            text = f"{gap:+.1f} ({low:+.1f} to {high:+.1f})"
            value = 100 * Measures.of(b)
            cells.append(f"{value:.1f}, {f'**{text}**' if low > 0 or high < 0 else text}")
        name = _name(other, [base, *others])
        rows.append([name, *cells])
        counts = {len(base.results), len(other.results), len(ids)}
        if len(counts) > 1:
            notes.append(f"{name}: {len(ids)} records in common, of its {len(other.results)} and {len(own)}.")
        if unlike := sum(set(own[n]) != set(theirs[n]) for n in ids):
            notes.append(f"{name}: of {unlike} records one of the two lacks a metric.")
    title = f"{base.told['protocol']}, {base.told['mode']}, {base.edits} edits"
    legend = (
        f"Over {len(base.results)} records, percent; after the comma the difference to {base.editor} on the records in "
        "common, with a 95% interval by paired bootstrap, bold where it leaves out 0."
        + (" GE is in hundredths of bits." if any(metric == FLUENCY for metric, _ in columns) else "")
    )
    return "\n\n".join([f"## {title}", markdown_table(heads, rows), legend, *notes])


def _columns(measured: Measures, entries: Sequence[Entry], metrics: Sequence[str] | None) -> list[tuple[str, str]]:
    present = {m for entry in entries for r in entry.results.values() for m in measured.values(r["post"])}
    present |= set(measured.scores)
    if metrics:
        unknown = sorted(set(metrics) - present)
        if unknown:
            raise ValueError(f"--metrics {unknown[0]!r} was not measured; there are: {', '.join(sorted(present))}")
        return [(metric, metric) for metric in metrics]
    return [(metric, title) for metric, title, _ in COLUMNS if metric in present]


def _value(measured: Measures, metric: str, values: Sequence[Mapping[str, float]]) -> str:
    parts = measured.parts(metric)
    rows = np.array([[of[p] for p in parts] for of in values if all(p in of for p in parts)])
    return f"{100 * Measures.of(rows):.1f}" if len(rows) else "-"


def _name(entry: Entry, among: Sequence[Entry]) -> str:
    """The editor, with what tells it from others of its name."""
    same = [other for other in among if other is not entry and other.editor == entry.editor]
    file = f" ({entry.file})" if any(other.file != entry.file for other in same) else ""
    edits = f", {entry.edits} edits" if any(other.edits != entry.edits for other in among) else ""
    return entry.editor + file + edits


if __name__ == "__main__":
    given = list(takewhile(lambda word: not word.startswith("--"), sys.argv[1:]))
    files = [f"--files={json.dumps(given)}"] if given or len(sys.argv) == 1 else []  # they may stand in a --config
    run(compare, [*files, *sys.argv[1 + len(given) :]])
