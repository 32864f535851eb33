"""Do hook layers answer for the edits and nothing else? `python -m trainers.scope --backbone.source NAME --data ...`

COMEBA-HK's figure 3: the z-scores of updated keys, beside those of texts that no edit is about.
"""

from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datamodules.sources import Source, load
from modules.backbone import BackboneConfig
from modules.training_free.coachhook import CoachHook
from modules.training_free.hook_scores import Scored, hook_scores, texts_of
from trainers.command import run
from trainers.drawing.scope import scope_figure
from trainers.editors import Spec
from trainers.records import drawn
from trainers.workers import Specs, build, wanted_of
from trainers.written import check_file, write_json


def scope(
    data: list[Source],
    backbone: BackboneConfig | None = None,
    editor: list[Spec] | None = None,
    records: int = 100,
    queries_per_kind: int | None = None,
    out: str = "scope.json",
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Edit records with hook layers, then ask what these make of prompts, rephrases and locality queries.

    Args:
        data: where the records come from: [{format: FORMAT, path: FILE, ...}, ...]; --data.help says which.
        backbone: the language model, as --backbone.source NAME.
        editor: coachhook, by name, by file, or with changes ({editor: coachhook, scope: {alpha: 1}}).
        records: how many, drawn by `seed`; they are edited in the editor's batches, one on top of another.
        queries_per_kind: ask only so many rephrases and locality queries of each kind, of a record.
        out: the JSON file; the figure lies beside it, as .png.
        seed: draws the records.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
    """
    specs = editor or ["coachhook"]
    if len(specs) != 1:
        raise ValueError(f"--editor: one editor with hook layers, got {len(specs)}")
    if records < 1:
        raise ValueError(f"--records must be at least 1, got {records}")
    wanted = Specs(backbone or BackboneConfig(), tuple(specs), device=device)
    (asked,) = wanted_of(wanted)
    if isinstance(asked, Path) or not issubclass(asked.kind, CoachHook):
        name = asked if isinstance(asked, Path) else asked.name
        raise ValueError(f"--editor {name} has no hook layers; coachhook has")
    file = Path(out)
    check_file(file, "--out")
    every = load(data)
    chosen = drawn(every.records, len(every), records, seed, queries_per_kind)
    model, (one,) = build(wanted)
    made = one.editor
    assert isinstance(made, CoachHook)
    with made.edit(model, [request for record in chosen for request in record.requests]) as edited:
        found = hook_scores(edited, texts_of(edited, chosen))  # type: ignore[arg-type]
        alphas = edited.alphas()  # type: ignore[attr-defined]
    about = {"editor": made.name, "records": len(chosen), "seed": seed, "backbone": model.config.source}
    write_json(file, {"meta": about, "alphas": alphas, "scores": [asdict(s) for s in found]})
    scope_figure(found, alphas, made.scope.relative).savefig(file.with_suffix(".png"))
    _print(found, alphas)
    print(f"written to {file} and {file.with_suffix('.png')}")


def _print(found: list[Scored], alphas: dict[str, float]) -> None:
    """How often each layer answers, in percent of the texts."""
    kinds = list(dict.fromkeys(s.kind for s in found))
    table = Table(title="texts for which a hook layer answers, percent")
    for column in ("layer", "alpha", *kinds):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for layer, alpha in alphas.items():
        shares = []
        for kind in kinds:
            opened = [s.open for s in found if s.kind == kind and s.layer == layer]
            shares.append(f"{100 * sum(opened) / len(opened):.1f}")
        table.add_row(layer, f"{alpha:.3f}", *shares)
    Console().print(table)


if __name__ == "__main__":
    run(scope)
