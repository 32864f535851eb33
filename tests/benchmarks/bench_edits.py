"""Edits trained per second, many at once against one at a time, and the memory of low-rank and of materialised edits.

    python tests/benchmarks/bench_edits.py                                # SmolLM2, as mend_smollm2.yaml edits it
    python tests/benchmarks/bench_edits.py --method ibke --edits 1 16
    python tests/benchmarks/bench_edits.py --model random --repeats 1     # a quick look
    python tests/benchmarks/bench_edits.py --device cuda --dtype bfloat16

Three ways to the same gradient of the same hypernetwork, from the same edits and queries, with one optimizer step after
all edits:

- parallel: the project's own step, N edits in one pass, as low-rank terms;
- loop: one edit after another, as the published code does it: the gradient of the edited weights with its factors, the
  hypernetwork, a d_in x d_out change, the model with changed weights, backward; gradients are accumulated. It is spared
  what that code could do without: gradients of other weights, logits that no loss needs, a Python loop over tokens for
  the statistics, a pass of its own for each query, padding;
- parallel, materialised: as the first, with N changes d_in x d_out instead of low-rank terms.

The gradients are compared before anything is timed; where they differ the benchmark fails. Ways take turns, and a time
is the median of all turns. Memory is what a step adds to what is there before it, each way in a process of its own: on
CUDA allocated bytes, on the CPU (Linux) resident bytes, where the C library returns freed blocks from 64 KiB on.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from edit_ways import CONFIGS, WAYS, Run, Subject, build, step, subject  # noqa: E402

TOLERANCE = {
    "float32": 5e-3,  # rounding, where it moves a clamp; in float64 they are 3e-9 apart (mend, SmolLM2, 4 edits)
    "bfloat16": 0.1,  # materialised weights are rounded, low-rank terms are not
}
MIB = 2**20


def check(subject: Subject, tolerance: float) -> tuple[float, dict[str, float]]:
    """How far the gradients of the ways are from that of the loop, and the GFLOP of each.

    Raises:
        SystemExit: where they are not the same.
    """
    gradients, work = {}, {}
    network = subject.module.deltas.network
    parameters = list(network.parameters())
    for way, run in WAYS.items():
        subject.run.optimizer.zero_grad()
        with FlopCounterMode(display=False) as counter:
            run(subject)
        gradients[way] = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
        work[way] = counter.get_total_flops() / 1e9
    network.commit()
    right = gradients["loop"]
    far = max(float((gradient - right).norm() / right.norm()) for gradient in gradients.values())
    if not far < tolerance:
        raise SystemExit(f"the ways do not give the same gradient: they are {far:.1e} apart, {tolerance} is allowed")
    return far, work


def seconds(subject: Subject, repeats: int) -> dict[str, float]:
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for turn in range(repeats + 1):  # the first is to warm up
        for way in WAYS:
            synchronise(subject)
            start = time.perf_counter()
            step(way, subject)
            synchronise(subject)
            taken[way] += [time.perf_counter() - start] if turn else []
    return {way: statistics.median(times) for way, times in taken.items()}


def synchronise(subject: Subject) -> None:
    if subject.batch.edits.is_cuda:
        torch.cuda.synchronize()


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def added(way: str, given: argparse.Namespace) -> list[int]:
    """In a process of its own: the bytes that a step adds, for each number of edits, rising."""
    run = build(given)
    step(way, subject(run, 1))  # what is made once, such as Adam's states
    run.optimizer.zero_grad()
    found = []
    for edits in given.edits:
        batch = subject(run, edits)
        if given.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            before = resident("VmRSS")
        step(way, batch)
        found.append((torch.cuda.max_memory_allocated() if given.device == "cuda" else resident("VmHWM")) - before)
        run.optimizer.zero_grad()
    return found


def memory(way: str) -> list[int]:
    """`added`, by a new process with the arguments of this one."""
    own = {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *sys.argv[1:], "--added", way]
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=CONFIGS["random"], default="mend")
    parser.add_argument("--model", choices=["smollm2", "random"], default="smollm2")
    parser.add_argument("--edits", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="of the language model")
    parser.add_argument("--memory", choices=["true", "false"], default="true")
    parser.add_argument("--added", choices=WAYS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.edits = sorted(given.edits)
    return given


def main() -> None:
    given = arguments()
    if given.added:
        print(json.dumps(added(given.added, given)))
        return
    device = torch.cuda.get_device_name() if given.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {given.method} on {given.model}, {given.dtype}; {load_average()}")
    run = build(given)
    columns = ["edits", "tokens", *(f"{way}, edits/s" for way in WAYS), "parallel / loop", "materialised / loop"]
    columns += ["GFLOP an edit", "of the loop", "gradients apart"]
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    for edits in given.edits:
        now = subject(run, edits)
        far, work = check(now, TOLERANCE[given.dtype])
        taken = seconds(now, given.repeats)
        tokens = int(now.batch.edits_mask.sum() + now.batch.queries_mask.sum())
        fast, slow, whole = (edits / taken[way] for way in WAYS)
        print(
            f"| {edits} | {tokens} | {fast:.2f} | {slow:.2f} | {whole:.2f} | {fast / slow:.2f} | {whole / slow:.2f} "
            f"| {work['parallel'] / edits:.1f} | {work['loop'] / edits:.1f} | {far:.0e} |",
            flush=True,
        )
    print(load_average())
    if given.memory == "true":
        show_memory(run, given)


def load_average() -> str:
    return "load " + " ".join(f"{x:.2f}" for x in os.getloadavg())


def show_memory(run: Run, given: argparse.Namespace) -> None:
    """What a step adds by each way, and what the edits themselves are by formula: N T (d_in + d_out) numbers of each
    layer, or N d_in d_out."""
    columns = ["edits", *(f"{way}, MiB" for way in WAYS), "low-rank terms, MiB", "changes of weights, MiB"]
    print(f"| {' | '.join(columns)} |\n|{'---:|' * len(columns)}")
    shapes = run.module.deltas.network.shapes.values()
    measured = zip(*(memory(way) for way in WAYS), strict=True)
    for edits, sizes in zip(given.edits, measured, strict=True):
        length = subject(run, edits).batch.edits.shape[1]
        low = 4 * edits * length * sum(d_in + d_out for d_in, d_out in shapes)
        whole = 4 * edits * sum(d_in * d_out for d_in, d_out in shapes)
        print(f"| {edits} | " + " | ".join(f"{size / MIB:,.0f}" for size in (*sizes, low, whole)) + " |", flush=True)
    print(load_average())


if __name__ == "__main__":
    main()
