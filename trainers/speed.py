"""What edits cost: `python -m trainers.speed --editor DIR --editor memit --data ... --edits 100,1000`.

Seconds to make so many edits and to decode under them, memory, and accuracy. Of InComeS against in-context learning
these are the paper's tables 4 and 5 and figure 3.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from datamodules.records import EditRecord, EditRequest
from datamodules.sources import Source, described
from datamodules.tokens import encode
from modules.backbone import Backbone, BackboneConfig
from modules.editor import Edited, Editor
from modules.export import versions
from modules.meter import Meter, now
from modules.speed import Measured, accuracy, decoding, made_up, prefill, state_bytes
from trainers.command import run
from trainers.drawing.speed import speed_figure
from trainers.editors import BASELINES, Spec
from trainers.markdown import markdown_table
from trainers.progress import bar
from trainers.provenance import command_line, hardware
from trainers.records import distinct
from trainers.workers import Specs, build, wanted_of
from trainers.written import check_folder, write_json, write_text

log = logging.getLogger(__name__)
ENOUGH = 20.0  # seconds of encoding after which it is not repeated


def speed(
    data: list[Source],
    editor: list[Spec] | None = None,
    baselines: list[str] | None = None,
    backbone: BackboneConfig | None = None,
    edits: list[int] | None = None,
    queries: int = 20,
    new_tokens: int = 16,
    repeats: int = 3,
    batch_size: int = 4,
    out: str = "speed",
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Measure encoding, decoding, memory and accuracy of editors and baselines, over numbers of edits made at once.

    Args:
        data: where the records come from: [{format: FORMAT, path: FILE, ...}, ...]; --data.help says which. More edits
            than there are records are made up of theirs.
        editor: as of trainers.evaluate: folders written by trainers.export, and training-free editors by name, by a
            file's path, or as a mapping with changes.
        baselines: unedited, icl; by default icl.
        backbone: what training-free editors and baselines run on, as --backbone.source NAME; by default the first
            exported editor's.
        edits: how many edits are made at once; by default 100, 200, 500, 1000. Where there are
            fewer records than that, time and memory alone.
        queries: so many are decoded, and of so many records accuracy is measured.
        new_tokens: tokens of an answer.
        repeats: of encoding, the median counts; an encoding that takes long is not repeated.
        batch_size: queries scored in one forward pass; each holds its own copy of a context's keys and values.
        out: the folder of speed.json, speed.md and speed.png.
        seed: draws the records.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: run code that the model's repository ships, where an exported editor asks for it.
    """
    known = ("icl",) if baselines is None else tuple(baselines)
    specs = Specs(backbone, tuple(editor or ()), known, device, trust_remote_code)
    wanted = wanted_of(specs)
    if alone := [name for name in specs.baselines if BASELINES[name].own_edit_only]:
        raise ValueError(f"--baselines: {alone[0]!r} is given each record's own edit, so many edits cost it nothing")
    if not (wanted or specs.baselines):
        raise ValueError("nothing to measure: give --editor, or --baselines")
    sizes = sorted(set(edits or (100, 200, 500, 1000)))
    if min(*sizes, queries, repeats, batch_size) < 1 or new_tokens < 2:
        raise ValueError(
            f"--edits {sizes}, --queries {queries}, --repeats {repeats}, --batch_size {batch_size} must be at least 1, "
            f"--new_tokens {new_tokens} 2"
        )
    check_folder(Path(out), "--out")
    records = distinct(data, sizes[-1], seed)
    requests = made_up([r.request for r in records], sizes[-1], seed)
    model, chosen = build(specs)
    measured = [one.editor for one in [*chosen[len(specs.baselines) :], *chosen[: len(specs.baselines)]]]
    rows: list[Measured] = []
    folder, console = Path(out), Console()
    about = {
        "command": command_line(),
        "editors": {one.editor.name: one.facts for one in chosen},
        "data": described(data),
        "records": len(records),
        "edit_tokens": _tokens(model, requests),
        "seed": seed,
        "queries": queries,
        "new_tokens": new_tokens,
        "backbone": asdict(model.config),
        "device": hardware(model.device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.model.dtype),
        "versions": versions(),
    }
    with bar(console, enabled=True) as shown:
        task = shown.add_task("", total=len(sizes) * len(measured))
        for one in measured:
            shown.update(task, description=f"{one.name}, warming up")
            measure(one, model, requests[:2], records[:1], True, 2, 1)  # what only the first pass pays
        for size in sizes:
            for one in measured:
                shown.update(task, description=f"{one.name}, {size} edits")
                asked = records[:size][:queries]
                own = size <= len(records)
                rows.append(measure(one, model, requests[:size], asked, not own, new_tokens, repeats, batch_size))
                write_json(folder / "speed.json", {"meta": about, "rows": [asdict(r) for r in rows]})
                shown.advance(task)
    write_text(folder / "speed.md", markdown(rows))
    speed_figure(rows).savefig(folder / "speed.png")
    _print(rows, console)
    console.print(f"written to {folder}: speed.json, speed.md, speed.png", highlight=False)


def measure(
    editor: Editor,
    backbone: Backbone,
    requests: Sequence[EditRequest],
    records: Sequence[EditRecord],
    is_made_up: bool = False,
    new_tokens: int = 16,
    repeats: int = 3,
    batch_size: int = 4,
) -> Measured:
    """One editor under these edits. Where it cannot be (the context window, the GPU's memory, edits that lack what the
    method needs), the row says why.

    Args:
        records: whose edits' prompts are decoded, and whose prompts and rephrases are scored.
    """
    prompts = [r.request.prompt or r.request.statement for r in records]
    try:
        meter = Meter(backbone, every=0.01)
        with ExitStack() as stack:
            with meter.running():
                edited, seconds = _encode(stack, editor, backbone, requests)
                decoded = decoding(edited, prompts, new_tokens)
            kept = state_bytes(edited)
        spent = [seconds]
        while len(spent) < repeats and sum(spent) < ENOUGH:
            with ExitStack() as stack:
                spent.append(_encode(stack, editor, backbone, requests)[1])
        scores = {} if is_made_up else _accuracies(editor, backbone, requests, records, batch_size)
    except Exception as error:  # whatever one editor does, the others' rows go on
        log.debug("%s failed", editor.name, exc_info=True)
        told = str(error).split("\n")[0]
        known = isinstance(error, (ValueError, NotImplementedError))
        return Measured(
            editor.name, len(requests), is_made_up, error=told if known else f"{type(error).__name__}: {told}"
        )
    return Measured(
        editor.name,
        len(requests),
        is_made_up,
        encode_seconds=median(spent),
        prompt_seconds=decoded.prompt,
        token_seconds=decoded.token,
        state_bytes=kept,
        peak_bytes=meter.peak,
        reliability=scores.get("reliability"),
        generality=scores.get("generality"),
    )


def _encode(
    stack: ExitStack, editor: Editor, backbone: Backbone, requests: Sequence[EditRequest]
) -> tuple[Edited, float]:
    """Edit for as long as the stack lasts; seconds from edits to a model that is ready for a query."""
    start = now(backbone)
    edited = stack.enter_context(editor.edit(backbone, requests))
    prefill(edited)
    return edited, now(backbone) - start


def _accuracies(
    editor: Editor,
    backbone: Backbone,
    requests: Sequence[EditRequest],
    records: Sequence[EditRecord],
    batch_size: int,
) -> dict[str, float]:
    own = [(r.request.prompt, r.request.target) for r in records if r.request.prompt and r.request.target]
    rephrased = [(r.rephrases[0].prompt, r.rephrases[0].target) for r in records if r.rephrases]
    with editor.edit(backbone, requests) as edited:
        return {
            name: accuracy(edited, *zip(*pairs, strict=True), batch_size=batch_size)
            for name, pairs in (("reliability", own), ("generality", rephrased))
            if pairs
        }


HEADS = (
    "Editor",
    "Edits",
    "Encoding, s",
    "an edit, ms",
    "Prompt, ms",
    "a token, ms",
    "State, MiB",
    "Peak, MiB",
    "Rel.",
    "Gen.",
)
LEGEND = (
    "Encoding: from edits to a model that is ready for queries; prompt: to read a query and give its first token, with "
    "all that is done for a query first; a token: each one after it, a query at a time. State: what is kept of the "
    "edits; peak: memory of encoding and decoding above what was held before. Percent of tokens, teacher-forced. "
    "* edits made up of the records', for time and memory alone."
)


def markdown(rows: Sequence[Measured]) -> str:
    """The table in Markdown, and below it what could not be measured and why."""
    notes = [f"{r.editor}, {r.edits} edits: {r.error}" for r in rows if r.error]
    return "\n\n".join([markdown_table(HEADS, map(_cells, rows)), LEGEND, *notes]) + "\n"


def _cells(row: Measured) -> tuple[str, ...]:
    edits = f"{row.edits:,}{'*' if row.made_up else ''}"
    each = row.encode_seconds and row.encode_seconds / row.edits
    numbers = (
        (row.encode_seconds, 1, 3),
        (each, 1e3, 2),
        (row.prompt_seconds, 1e3, 1),
        (row.token_seconds, 1e3, 1),
        (row.state_bytes, 2**-20, 1),
        (row.peak_bytes, 2**-20, 0),
        (row.reliability, 100, 1),
        (row.generality, 100, 1),
    )
    return (
        row.editor,
        edits,
        *("-" if value is None else f"{value * unit:,.{digits}f}" for value, unit, digits in numbers),
    )


def _print(rows: Sequence[Measured], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, head in enumerate(HEADS):
        table.add_column(head.replace(", ", "\n"), justify="right" if i else "left")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print(LEGEND, style="dim", highlight=False)
    for row in rows:
        if row.error:
            console.print(f"{row.editor}, {row.edits} edits: {row.error}", style="red", highlight=False)


def _tokens(backbone: Backbone, requests: Sequence[EditRequest]) -> float:
    """Of an edit, on average."""
    return sum(len(encode(backbone.tokenizer, "", r.statement).ids) for r in requests) / len(requests)


if __name__ == "__main__":
    run(speed)
