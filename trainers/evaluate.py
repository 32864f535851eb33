"""Compare editors on one set of records: `python -m trainers.evaluate --config evaluate_facts.yaml --editor DIR`."""

import random
from pathlib import Path

from datamodules.sources import Source, load
from modules.backbone import BackboneConfig, load_backbone
from modules.editor import Editor
from modules.evaluation import fewer_queries
from modules.export import load_editor
from modules.training_free.icl import InContext, RightEdit, Unedited
from trainers.command import run
from trainers.evaluation_run import Protocol, run_evaluation

BASELINES: dict[str, type[Editor]] = {e.name: e for e in (Unedited, InContext, RightEdit)}


def evaluate(
    data: list[Source],
    editor: list[str] | None = None,
    baselines: list[str] | None = None,
    backbone: BackboneConfig | None = None,
    records: int = 100,
    pool_sizes: list[int] | None = None,
    singles: int = 20,
    queries_per_kind: int | None = None,
    exact_match: bool = True,
    out: str = "evaluation.json",
    seed: int = 0,
    batch_size: int = 32,
    protocol: Protocol = "default",
) -> None:
    """Evaluate exported editors beside baselines, on the same records, and write one JSON file and a table.

    Args:
        data: where the records come from.
        editor: folders written by trainers.export.
        baselines: any of unedited, icl, icl_right_edit.
        backbone: what the baselines run on; by default the first editor's.
        records: how many records, drawn by `seed`.
        pool_sizes: how many edits stand at once.
        singles: at pool size 1, where each record is a pool of its own, take only so many records.
        queries_per_kind: ask only so many rephrases, and locality and portability queries of each kind, of a record.
        exact_match: also generate and compare whole answers.
        out: the JSON file.
        seed: draws the records, and the bootstrap.
        batch_size: queries in one forward pass.
        protocol: default (EasyEdit's token accuracy, exact match), or uniedit (top-5, related hops edited in;
            nothing is generated).
    """
    baselines = ["unedited", "icl", "icl_right_edit"] if baselines is None else baselines
    wrong = sorted(set(baselines) - set(BASELINES))
    if wrong:
        raise ValueError(f"unknown baseline {wrong[0]!r}; there are: {', '.join(BASELINES)}")
    trained = [load_editor(folder) for folder in editor or []]
    names = [e.name for e in trained]
    for e, folder in zip(trained, editor or [], strict=True):
        if names.count(e.name) > 1:
            e.name = f"{e.name} ({Path(folder).name})"
    if backbone is None and not trained:
        raise ValueError("nothing to evaluate on: give --editor DIR, or --backbone.source for the baselines")
    model = load_backbone(backbone) if backbone else trained[0].model.reader
    every = load(data)
    chosen = every.records(random.Random(seed).sample(range(len(every)), min(records, len(every))))
    if queries_per_kind:
        chosen = [fewer_queries(record, queries_per_kind, seed) for record in chosen]
    run_evaluation(
        [*(BASELINES[name]() for name in baselines), *trained],
        model,
        chosen,
        pool_sizes or [1, 10, 100],
        exact_match,
        Path(out),
        data="; ".join(f"{s.name}" for s in data),
        seed=seed,
        batch_size=batch_size,
        singles=singles,
        protocol=protocol,
    )


if __name__ == "__main__":
    run(evaluate)
