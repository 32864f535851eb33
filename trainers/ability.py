"""General ability before and after edits: `python -m trainers.ability --config ability_smollm2.yaml --editor memit`.

The tasks and their files are those of modules/ability; editors are chosen as in trainers/evaluate.py.
"""

import random
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser

from datamodules.sources import Source, described, load
from modules.ability import DEFAULT, TASKS
from modules.ability.states import check_counts
from modules.ability.task import Task
from modules.backbone import BackboneConfig
from trainers.ability_run import check_tasks, run_ability
from trainers.command import run
from trainers.editors import Spec
from trainers.workers import Specs, build, wanted_of
from trainers.written import check_file


def ability(
    data: list[Source],
    tasks: list[Spec] | None = None,
    editor: list[Spec] | None = None,
    backbone: BackboneConfig | None = None,
    edits: list[int] | None = None,
    batch: int | None = None,
    examples: int | None = 200,
    released: bool = False,
    out: str = "ability.json",
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Put tasks of general ability to a model, unedited and after so many edits by each editor: one JSON file, a table.

    Args:
        data: where the records come from that are edited: [{format: FORMAT, path: FILE, ...}, ...]; --data.help says
            which.
        tasks: any of rte, nq_open, samsum, sst2, mmlu, squad; by default all but the last. With changes as a mapping:
            {task: mmlu, shots: 0}. Any task of lm-eval, with that extra: {task: lm_eval, name: hellaswag}.
            A task whose file is not there is left out, with a word.
        editor: folders written by trainers.export, and training-free editors: by name, by file, or with changes.
        backbone: what is asked and edited, as --backbone.source NAME; by default the first exported editor's.
        edits: after how many records, the first so many of those drawn; 0 is the unedited model. By default 0 and 100.
        batch: records of one edit, each on top of all earlier ones; by default all in one call.
        examples: of each task, drawn by `seed`; null: all.
        released: also judge by the rules of EAC's released code, where they differ.
        out: the JSON file; the table lies beside it, as .md. A later call adds to it and runs nothing again
            that it holds; a file of other records, of another model or of other settings is refused.
        seed: draws records and examples, and the bootstrap.
        batch_size: examples in one forward pass.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
        trust_remote_code: run code that the model's repository ships, where an exported editor asks for it.
    """
    counts = sorted(set(edits if edits is not None else [0, 100]))
    if not counts or counts[0] < 0 or (examples is not None and examples < 1):
        raise ValueError(
            f"--edits must be 0 or more and --examples at least 1; got edits {counts}, examples {examples}"
        )
    if (counts[-1] > 0) != bool(editor):
        raise ValueError(
            f"--edits {counts} and {len(editor or [])} editors do not go together; give --editor, or edits 0"
        )
    if batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {batch_size}")
    chosen_tasks = [task(spec, released) for spec in tasks or DEFAULT]
    check_tasks(chosen_tasks)
    check_file(Path(out), "--out")
    specs = Specs(backbone, tuple(editor or ()), device=device, trust_remote_code=trust_remote_code)
    wanted_of(specs)
    every = load(data)
    if counts[-1] > len(every):
        raise ValueError(
            f"--edits {counts[-1]}: there are only {len(every)} records in {', '.join(s.name for s in data)}"
        )
    check_counts(counts[-1], [count for count in counts if count], batch)
    # a shuffle, not a sample: the first hundred are the same however many more are edited
    order = random.Random(seed).sample(range(len(every)), len(every))
    records = every.records(order[: counts[-1]]) if counts[-1] else []
    about = {"data": described(data), "seed": seed, "batch_size": batch_size}
    model, editors = build(specs)
    run_ability(chosen_tasks, editors, model, records, counts, batch, examples, Path(out), **about)


def task(spec: Spec, released: bool = False) -> Task:
    """A task by name, or with changes ({task: mmlu, shots: 0}).

    Raises:
        ValueError: for an unknown task or option, or a value of a wrong type.
    """
    changes: dict[str, Any] = {"task": spec} if isinstance(spec, str) else dict(spec)
    name = changes.pop("task", None)
    if name not in TASKS:
        raise ValueError(
            f"--tasks: no task {name!r}; there are: {', '.join(TASKS)}; changes as {{task: mmlu, shots: 0}}"
        )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TASKS[name], "task")
    try:
        known = parser.get_defaults().as_dict()["task"]
        parsed = parser.parse_object({"task": ({"released": released} if "released" in known else {}) | changes})
    except ArgumentError as error:
        raise ValueError(f"--tasks {name}: {' '.join(str(error).replace('task.', '').split())}") from error
    return parser.instantiate(parsed).task


if __name__ == "__main__":
    run(ability)
