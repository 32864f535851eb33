"""Compare editors on one set of records: `python -m trainers.evaluate --config evaluate_facts.yaml --editor DIR`.

`--editor`, given once or more often, takes exported folders and training-free editors alike (trainers/editors.py).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from datamodules.sources import Source, described, load
from modules.backbone import BackboneConfig
from modules.evaluation import check_queries_per_kind
from modules.modes import stops_of
from trainers.benchmark.grid import Benchmark, check_only, places
from trainers.benchmark.run import records_of, run_benchmark
from trainers.command import run
from trainers.editors import BASELINES, Spec, TrainingFree
from trainers.evaluation_run import run_evaluation
from trainers.no_effect import refuse_beside_a_benchmark, refuse_beside_a_mode
from trainers.protocols import Demonstrations, Judging, Protocol
from trainers.records import drawn, meeting_conditions
from trainers.retention import run_consecutive
from trainers.workers import Specs, build, wanted_of
from trainers.written import check_file, check_folder

POOL_SIZES = [1, 10, 100]
SINGLES = 20


def evaluate(
    data: list[Source] | None = None,
    editor: list[Spec] | None = None,
    baselines: list[str] | None = None,
    backbone: BackboneConfig | None = None,
    records: int = 100,
    pool_sizes: list[int] | None = None,
    singles: int = SINGLES,
    queries_per_kind: int | None = None,
    asked: int | None = None,
    exact_match: bool = True,
    out: str = "evaluation.json",
    seed: int = 0,
    batch_size: int = 32,
    protocol: Protocol = "default",
    mode: Literal["single", "batch", "sequential", "consecutive"] = "batch",
    batch: int | None = None,
    checkpoints: list[int] | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    demonstrations: Demonstrations | None = None,
    fluency: bool = False,
    references: str | None = None,
    benchmark: Benchmark | None = None,
) -> None:
    """Evaluate exported and training-free editors beside baselines, on the same records: one JSON file and a table.

    Args:
        data: where the records come from: [{format: FORMAT, path: FILE, ...}, ...]; --data.help says which.
        editor: folders written by trainers.export, and training-free editors: by the name of a config in
            configs/training_free, by a file's path, or as a mapping with changes ({editor: memit, weight: 1500}).
        baselines: any of unedited, icl, icl_right_edit; by default all that the mode allows.
        backbone: what training-free editors and baselines run on, as --backbone.source NAME; by default the first
            exported editor's.
        records: how many records, drawn by `seed`.
        pool_sizes: how many edits stand at once; by default 1, 10 and 100.
        singles: at pool size 1, where each record is a pool of its own, take only so many records.
        queries_per_kind: ask only so many rephrases, and locality and portability queries of each kind, of a record;
            of MQuAKE's edits and hops all are asked.
        asked: ask only the first so many records of each pool; all of them are edited. For pools whose questions would
            take longer than their edits.
        exact_match: also generate and compare whole answers (default protocol).
        out: the JSON file. A later call adds to it and runs nothing again that it holds; a file of other records,
            of another model or of other settings is refused.
        seed: draws the records, and the bootstrap.
        batch_size: queries in one forward pass.
        protocol: default (EasyEdit's token accuracy, exact match), uniedit (top-5, related hops edited in),
            counterfact (ES, PS, NS, EM, PM, NM, S), zsre (efficacy, paraphrase, specificity, score), mquake (few-shot
            answers to any of three questions) or dune (its answer rules).
        mode: `single`: each record from the unedited model, as `batch` with pools of 1; `batch`: pools of `pool_sizes`,
            or of `batch`; `sequential`: one record after another on top of all earlier ones; `consecutive`: batches of
            `batch` likewise. These two are evaluated at `checkpoints` over all edits so far.
        batch: records of one edit.
        checkpoints: numbers of records edited so far; by default 1, 10, 100, ... and the end.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: run code that the model's repository ships, where an exported editor asks for it.
        demonstrations: of the protocol mquake.
        fluency: of the protocol counterfact: let the models write too, and measure fluency (GE); takes minutes.
        references: texts in the shape of ROME's attribute_snippets.json, for the consistency (RS) of what is written.
        benchmark: a grid of data sets and runs for all editors, in place of one set and mode; see
            configs/benchmark_smollm2.yaml.
    """
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    check_queries_per_kind(queries_per_kind, "--queries_per_kind")
    other_sizes = pool_sizes if pool_sizes != POOL_SIZES else None
    if benchmark:
        refuse_beside_a_benchmark(
            evaluate,
            records=records,
            pool_sizes=other_sizes,
            singles=singles,
            queries_per_kind=queries_per_kind,
            asked=asked,
            exact_match=exact_match,
            mode=mode,
            batch=batch,
            checkpoints=checkpoints,
            out=out,
        )
    one_by_one = mode in ("single", "sequential")
    if (one_by_one and batch not in (None, 1)) or (mode == "consecutive" and not batch):
        raise ValueError(f"--mode {mode} and --batch {batch} do not go together; --mode consecutive needs a --batch")
    consecutively = mode in ("sequential", "consecutive")
    if asked is not None and (asked < 1 or consecutively):
        raise ValueError(f"--asked must be at least 1, and is of --mode batch; got {asked}, and the mode is {mode}")
    if checkpoints and not consecutively:
        raise ValueError(f"--checkpoints are of --mode sequential and consecutive; the mode is {mode}")
    sizes = [1] if mode == "single" else pool_sizes or POOL_SIZES if batch is None else [batch]
    numbers = {"records": records, "singles": singles}
    numbers |= {"pool_sizes": min(sizes)} if batch is None else {"batch": batch}
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name} must be at least 1, got {number}")
    refuse_beside_a_mode(mode, batch, other_sizes, singles if singles != SINGLES else None, sizes)
    judging = Judging(protocol, exact_match, demonstrations or Demonstrations(), fluency, references)
    if baselines is None:
        baselines = [name for name, kind in BASELINES.items() if not (consecutively and kind.own_edit_only)]
    specs = Specs(backbone, tuple(editor or ()), tuple(baselines), device, trust_remote_code)
    wanted = wanted_of(specs)
    if not (wanted or baselines):
        raise ValueError("nothing to evaluate: give --editor, or --baselines")
    if benchmark:
        if data:
            raise ValueError("--data: a benchmark names its own data sets, benchmark.datasets; leave it out")
        if replace(judging, exact_match=False) != Judging():
            raise ValueError("--protocol and its options: each of benchmark.datasets names its own; leave them out")
        check_folder(Path(benchmark.out), "benchmark.out")
        named = [one.name for one in wanted if isinstance(one, TrainingFree)]
        if len(named) == len(wanted):  # an exported editor's name is known once it is loaded
            check_only(places(benchmark, [*baselines, *named]), benchmark.only)
        chosen, origins = records_of(benchmark, seed)
        run_benchmark(benchmark, chosen, origins, specs, *build(specs), seed=seed, batch_size=batch_size)
        return
    if not data:
        raise ValueError("nothing to evaluate: give --data, or a --benchmark")
    check_file(Path(out), "--out")
    every = load(data)
    drawn_records = drawn(every.records, len(every), records, seed, queries_per_kind)
    judging.check(drawn_records)
    if consecutively:
        stops_of(len(drawn_records), batch or 1, checkpoints)
    model, editors = build(specs)
    drawn_records = meeting_conditions(model, drawn_records, batch_size)
    about: dict[str, Any] = {"data": described(data), "seed": seed, "batch_size": batch_size}
    about |= {"queries_per_kind": queries_per_kind, "available": len(every)}
    if consecutively:
        run_consecutive(editors, model, drawn_records, batch or 1, checkpoints, judging, Path(out), **about)
        return
    run_evaluation(
        editors,
        model,
        drawn_records,
        sizes,
        judging,
        Path(out),
        singles=None if mode == "single" else singles,
        mode=mode,
        asked=asked,
        **about,
    )


if __name__ == "__main__":
    run(evaluate)
