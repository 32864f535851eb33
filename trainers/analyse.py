"""What an exported InComeS selects: `python -m trainers.analyse --editor DIR --data ... --pool_sizes 10,100 --out DIR`.

The paper's figure 4: temperature by entropy alignment (a), the zero-gist by layer (b), traces along tokens (c, d).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from datamodules.sources import Source, described
from modules.export import load_editor, versions
from modules.gist.analysis import profile
from modules.gist.analysis_temperature import HOT, Aligned, Tokens, align
from modules.gist.analysis_traces import Place, Traces, by_answer_token, by_place, traces
from modules.gist.editor import GistEdited, GistEditor
from modules.gist.pool import GistPool
from trainers.command import run
from trainers.drawing.selection import layer_profile, place_figure, token_trace
from trainers.drawing.temperature import temperature_figure
from trainers.progress import bar
from trainers.provenance import command_line
from trainers.records import distinct
from trainers.workers import device_named
from trainers.written import check_folder, write_json


def analyse(
    editor: str,
    data: list[Source],
    pool_sizes: list[int] | None = None,
    reference: int | None = None,
    queries: int = 100,
    tokens: Tokens = "all",
    out: str = "analysis",
    seed: int = 0,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Analyse what an exported InComeS selects among growing pools: one JSON file, tables and figures.

    Args:
        editor: a folder written by trainers.export, of InComeS.
        data: where the records come from: [{format: FORMAT, path: FILE, ...}, ...]; --data.help says which.
        pool_sizes: how many edits stand at once; by default 10, 20, 50, 100.
        reference: the pool size whose entropy larger ones are aligned to: 1 in the paper. By default the largest that
            the editor was trained on, where its editor.json tells; else 1.
        queries: of each pool size, about so many edits one query in and one out of scope are asked, and so many edits
            are read as texts for their entropy.
        tokens: which tokens count in the entropy: all of a text (paper), or those that predict its answer.
        out: the folder of analysis.json, temperature.png and, by pool size, layers_N.png, places_N.png, tokens_N.png.
        seed: draws the records.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: run code that the model's repository ships, where an exported editor asks for it.
    """
    refuse_others(editor)
    place = device_named(device)
    check_folder(Path(out), "--out")
    sizes = sorted(set(pool_sizes or (10, 20, 50, 100)))
    base = reference if reference is not None else trained_on(editor)
    if min(*sizes, base, queries) < 1:
        raise ValueError(f"--pool_sizes {sizes}, --reference {base}, --queries {queries}: all must be at least 1")
    records = distinct(data, max(*sizes, base, queries), seed)
    if max(*sizes, base) > len(records):
        raise ValueError(
            f"--pool_sizes, --reference: the largest pool has {max(*sizes, base)} edits, the data has {len(records)} "
            "different ones; give more data or smaller pools"
        )
    loaded = load_editor(editor, trust_remote_code)
    assert isinstance(loaded, GistEditor)
    loaded.to(place)
    folder, console = Path(out), Console()
    with bar(console, enabled=True) as shown:
        task = shown.add_task("encoding edits", total=len({*sizes, base}) + len(sizes) * queries)
        everything = GistEdited(loaded.model, [], GistPool()).add([r.request for r in records])
        shown.update(task, description="entropy")
        aligned = align(everything, records, sizes, base, queries, tokens, lambda _: shown.advance(task))
        found = []
        for size in sizes:
            shown.update(task, description=f"traces, {size} edits")
            found.append(traces(everything, records, size, queries, lambda n: shown.advance(task, n)))
    largest = next(a for a in aligned if a.edits == sizes[-1])  # the reference may be larger
    layers, configured = list(loaded.model.active), loaded.model.config.temperature
    about = {
        "command": command_line(),
        "editor": str(editor),
        "data": described(data),
        "records": len(records),
        "seed": seed,
        "selection": loaded.model.config.selection,
        "layers": layers,
        "tokens": tokens,
        "versions": versions(),
    }
    told = {
        "meta": about,
        "temperature": {
            "reference": base,
            "configured": configured,
            "to_set": largest.temperature,
            "pools": [asdict(a) for a in aligned],
        },
        "selection": {str(t.edits): _told(t) for t in found},
    }
    figures = {"temperature": temperature_figure(aligned, base, configured)}
    for one in found:
        figures |= _figures(one, layers)
    for name, figure in figures.items():
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png")
    write_json(folder / "analysis.json", told)
    _print(console, aligned, largest, found, layers, base, configured, Path(editor))
    console.print(f"written to {folder}: analysis.json and {len(figures)} figures", highlight=False)


def refuse_others(folder: str) -> None:
    """Refuse a folder that is no export, and the export of another editor by its name, before anything is loaded.

    Raises:
        ValueError: where it is one.
    """
    if not (Path(folder) / "editor.json").is_file():
        raise ValueError(
            f"--editor {folder} is no exported editor: it has no editor.json. Make one with `python -m trainers.export`"
        )
    name = facts_of(folder).get("editor", GistEditor.name)
    if name != GistEditor.name:
        raise ValueError(f"--editor {folder} is an export of {name!r}, which has no gists; give one of 'incomes'")


def trained_on(folder: str) -> int:
    """The largest pool that an exported editor was trained on, where its editor.json tells; else 1."""
    return max(facts_of(folder).get("data", {}).get("init_args", {}).get("pool_sizes") or [1])


def facts_of(folder: str) -> dict[str, Any]:
    """editor.json of an export; nothing where it cannot be read, which load_editor says better."""
    try:
        return json.loads((Path(folder) / "editor.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _told(one: Traces) -> dict[str, Any]:
    """What the JSON file has of one pool size."""
    inside, outside = (profile(t)._asdict() if t else {} for t in (one.inside, one.outside))
    return {
        "queries": {"in_scope": len(one.inside), "out_of_scope": len(one.outside)},
        "answered_right": {"in_scope": _share(one.inside), "out_of_scope": _share(one.outside)},
        "by_layer": {
            "in_scope": {n: t.tolist() for n, t in inside.items()},
            "out_of_scope": {n: t.tolist() for n, t in outside.items() if n != "golden"},
        },
        "by_answer_token": [a._asdict() for a in by_answer_token(one.inside)],
        "by_place": {name: [asdict(p) for p in places] for name, places in _places(one).items()},
    }


def _places(one: Traces) -> dict[str, list[Place]]:
    return {
        name: by_place([t for t in one.inside if t.right is right])
        for name, right in (("right", True), ("wrong", False))
    }


def _share(found: Sequence[Any]) -> float | None:
    return sum(t.right for t in found) / len(found) if found else None


def _figures(one: Traces, layers: Sequence[int]) -> dict[str, Figure]:
    if not one.inside:  # statements alone, of which nothing is asked
        return {}
    outside = profile(one.outside) if one.outside else None
    return {
        f"layers_{one.edits}": layer_profile(layers, profile(one.inside), outside),
        f"places_{one.edits}": place_figure(**_places(one), edits=one.edits),
        f"tokens_{one.edits}": token_trace(one.examples),
    }


def _print(
    console: Console,
    aligned: Sequence[Aligned],
    largest: Aligned,
    found: Sequence[Traces],
    layers: Sequence[int],
    reference: int,
    configured: float,
    folder: Path,
) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"temperature that keeps the entropy of pools of {reference}")
    for column in ("edits", "entropy", "temperature", "by layer", "entropy then"):
        table.add_column(column, justify="right")
    for a in aligned:
        each = [t for t in a.temperatures if t is not None]
        spread = f"{min(each):.2f} - {max(each):.2f}" if len(each) > 1 else "-"
        then = _number(_mean(a.entropy_then) if a.entropy_then else None)
        table.add_row(str(a.edits), _number(_mean(a.entropy)), _number(a.temperature), spread, then)
    console.print(table)
    if largest.temperature is None:
        console.print(f"no temperature gives pools of {largest.edits} that entropy", highlight=False)
    elif largest.edits >= HOT:
        console.print(
            f"to set for pools of {largest.edits}: gist.temperature {largest.temperature:.2f} (now {configured:g}), in "
            f"a config or in {folder / 'editor.json'}",
            highlight=False,
            soft_wrap=True,
        )
    for one in found:
        if one.inside:
            _print_layers(console, one, layers)
            _print_answers(console, one)


def _print_layers(console: Console, one: Traces, layers: Sequence[int]) -> None:
    inside, outside = profile(one.inside), profile(one.outside) if one.outside else None
    table = Table(box=box.SIMPLE_HEAD, title=f"{one.edits} edits: probabilities where the answer is predicted")
    for column in ("layer", "zero-gist, in scope", "out of scope", "golden gist", "entropy"):
        table.add_column(column, justify="right")
    shared = len(inside.zero) < len(layers)
    for i, layer in enumerate([f"{layers[0]}-{layers[-1]}"] if shared else map(str, layers)):
        zero = f"{float(outside.zero[i]):.3f}" if outside else "-"
        values = (
            f"{float(inside.zero[i]):.3f}",
            zero,
            f"{float(inside.golden[i]):.3f}",
            f"{float(inside.entropy[i]):.2f}",
        )
        table.add_row(layer, *values)
    console.print(table)


def _print_answers(console: Console, one: Traces) -> None:
    table = Table(box=box.SIMPLE_HEAD, title=f"{one.edits} edits: the answers' tokens, given those before")
    for column in ("token", "queries", "right", "golden gist"):
        table.add_column(column, justify="right")
    for a in by_answer_token(one.inside):
        table.add_row(str(a.token), str(a.queries), f"{a.right:.3f}", f"{a.golden:.3f}")
    console.print(table)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


if __name__ == "__main__":
    run(analyse)
