"""Estimated against measured memory of real training on CPU: each configuration in a process of its own.

    python tests/benchmarks/bench_memory.py                 # all configurations
    python tests/benchmarks/bench_memory.py --only upper    # those whose name has "upper"

Measured is the peak resident set of two optimizer steps on a random model and texts as long as the limits allow, over
that of a run of a model of next to no parameters (width 8) before it in the same process, which has loaded the
libraries and needs no memory to speak of. The estimate is without what it allows for a process. The C library keeps
much of what is freed: the last columns are of a run in which it returns blocks from 64 KiB on
(MALLOC_MMAP_THRESHOLD_=65536), whose resident set is what the tensors hold. Linux.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
EDIT, QUERY, RECORDS = 64, 128, 16
MODEL = "--model.init_args."
BASE = [
    f"{MODEL}queries.max_edit_tokens={EDIT}",
    f"{MODEL}queries.max_query_tokens={QUERY}",
    f"--data.init_args.records_per_batch={RECORDS}",
    "--data.init_args.pool_rates=[1.0]",
    "--trainer.num_sanity_val_steps=0",
    "--checkpoint.at_end=false",
    "--trainer.limit_val_batches=0",
    "--trainer.gradient_clip_val=null",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
POOL = "--data.init_args.pool_sizes"
HYPER = [f"{MODEL}layers.layers=[-2,-1]", f"{MODEL}calibration_records=1", f"{POOL}=[1]"]
EDITORS = {
    "incomes": ["--config=incomes_tiny.yaml", f"{MODEL}calibration_records=0", f"{POOL}=[{RECORDS}]"],
    "mend": ["--config=mend_tiny.yaml", f"{MODEL}mend.rank=512", *HYPER],
    "ibke": ["--config=ibke_tiny.yaml", f"{MODEL}ibke.width=256", *HYPER],
}
PUBLISHED = [f"{MODEL}gist.selection=qk", f"{MODEL}loss.golden_weight=0"]
SMALL = SHAPE | {"num_hidden_layers": 2, "vocab_size": 16000}
NOTHING = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "vocab_size": 257,
}
CHECKPOINTING = [f"{MODEL}gradient_checkpointing=true"]
CASES: dict[str, list[str]] = {
    "full": PUBLISHED,
    "full, checkpointing": [*PUBLISHED, *CHECKPOINTING],
    "upper": [*PUBLISHED, f"{MODEL}train=upper"],
    "upper, checkpointing": [*PUBLISHED, f"{MODEL}train=upper", *CHECKPOINTING],
    "upper, original reads": [f"{MODEL}train=upper", f"{MODEL}reader=original"],
    "lora": [*PUBLISHED, f"{MODEL}train=lora"],
    "lora, checkpointing": [*PUBLISHED, f"{MODEL}train=lora", *CHECKPOINTING],
    "full, eager attention": [*PUBLISHED, f"{MODEL}backbone.attention=eager"],
    "full, bf16-mixed": [*PUBLISHED, "--trainer.precision=bf16-mixed"],
    "full, two micro-batches": [*PUBLISHED, "--trainer.accumulate_grad_batches=2"],
    "full, ZeRO-2": [*PUBLISHED, "--config=zero2_cpu.yaml"],
    "small": PUBLISHED,
    "mend": [],
    "mend, checkpointing": CHECKPOINTING,
    "mend, bf16 language model": [f"{MODEL}backbone.dtype=bfloat16"],
    "mend, pools of 4": [f"{POOL}=[4]"],
    "mend, two micro-batches": ["--trainer.accumulate_grad_batches=2"],
    "mend, ZeRO-2": ["--config=zero2_cpu.yaml"],
    "mend, small": [],
    "ibke": [],
}


def write_pairs(folder: Path) -> dict[str, Any]:
    """Texts of bytes, one token each: a micro-batch has edits of the longest, and queries of the longest."""
    short = [{"edit": f"{i:02d}", "text": "q" * (QUERY - 3)} for i in range(50)]
    long = [{"edit": f"{i:02d}".rjust(EDIT, "e"), "text": "q" * (QUERY - EDIT - 1)} for i in range(50)]
    file = folder / "longest.json"
    file.write_text(json.dumps(short + long))
    return {"format": "pairs", "path": str(file), "options": {"edit": "edit", "text": "text"}}


def write_records(folder: Path) -> dict[str, Any]:
    """Records of which each edit and each query is of the longest, all but the first 12 bytes its answer."""
    from datamodules.records import EditRecord, EditRequest, Query

    def asked(start: str) -> tuple[Query, ...]:
        return (Query(start.ljust(12), ("a" * (QUERY - 12),)),)

    made = [
        EditRecord(
            id=f"longest/{i}",
            requests=(EditRequest(f"{i:02d}".ljust(12), "a" * (EDIT - 12)),),
            rephrases=asked(f"{i:02d} again"),
            locality={"near": asked("other")},
        )
        for i in range(100)
    ]
    file = folder / "longest.jsonl"
    file.write_text("\n".join(record.to_json() for record in made), encoding="utf-8")
    return {"format": "records", "path": str(file), "options": {"on_error": "raise"}}


def train(runs: list[list[str]]) -> None:
    """In a process of its own: do the runs, and print how much each raised the peak of the resident set, in bytes."""
    from trainers.cli import TrainingCLI

    peaks = [0]
    for args in runs:
        cli = TrainingCLI(args)
        cli.trainer.fit(cli.model, cli.datamodule)
        peaks.append(peak())
    print(json.dumps([after - before for before, after in itertools.pairwise(peaks)]))


def peak() -> int:
    """Bytes of this process's resident set at its peak. (`ru_maxrss` would begin at that of the process it is from.)"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(runs: list[list[str]], returned: bool = False) -> list[int]:
    """How much each run adds to the peak of those before it, in one new process."""
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    own = {"OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    own |= {"MALLOC_MMAP_THRESHOLD_": "65536"} if returned else {}
    command = [sys.executable, __file__, "--train", json.dumps(runs)]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, returned: Sequence[bool] = (False, True), steps: int = 2) -> tuple[int, list[int]]:
    """Estimate and measurements of a case, in bytes."""
    from trainers.estimate import estimate, named
    from trainers.estimate.command import parsed

    with tempfile.TemporaryDirectory() as folder:
        editor = next((e for e in EDITORS if name.split(",")[0] == e), "incomes")
        source = (write_pairs if editor == "incomes" else write_records)(Path(folder))
        data = f"--data.init_args.train={json.dumps([source])}"

        def run(shape: dict[str, int], number: int, *more: str) -> list[str]:
            model = f"{MODEL}backbone.overrides={json.dumps(shape)}"
            steps = [f"--run_dir={folder}/{number}", f"--trainer.max_steps={number}"]
            return [*EDITORS[editor], *BASE, data, model, *steps, *more]

        given = run(SMALL if name.endswith("small") else SHAPE, steps, *CASES[name])
        found = estimate(parsed(given), 1, named("cpu"))
        measured = [measure([run(NOTHING, 1), given], kind)[1] for kind in returned]
    return found.total - found.components["process"], measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of the configurations")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        train(json.loads(given.train))
        return
    print("| configuration | estimated MiB | measured | ratio | measured, freed memory returned | ratio |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in CASES:
        if given.only in name:
            estimated, measured = compare(name)
            columns = " | ".join(f"{size / 2**20:,.0f} | {estimated / size:.2f}" for size in measured)
            print(f"| {name} | {estimated / 2**20:,.0f} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
