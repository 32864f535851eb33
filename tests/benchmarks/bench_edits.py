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
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from datamodules.records import EditRecord  # noqa: E402
from datamodules.schedule import Slot  # noqa: E402
from datamodules.sources import load  # noqa: E402
from modules.gradients import Factors  # noqa: E402
from modules.hypernetwork.batch import EditBatch  # noqa: E402
from modules.hypernetwork.module import GradientEditor  # noqa: E402
from modules.interventions import LowRank, hooked, linear, low_rank  # noqa: E402
from trainers.estimate.command import parsed  # noqa: E402

CONFIGS = {
    "smollm2": {"mend": "mend_smollm2.yaml", "ibke": "ibke_smollm2_zsre_counterfact.yaml"},
    "random": {"mend": "mend_tiny.yaml", "ibke": "ibke_tiny.yaml"},
}
FACTS = {"format": "facts", "path": None, "options": {"split": "train"}, "limit": 2000}
RANDOM = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
TOLERANCE = {
    "float32": 5e-3,  # rounding, where it moves a clamp; in float64 they are 3e-9 apart (mend, SmolLM2, 4 edits)
    "bfloat16": 0.1,  # materialised weights are rounded, low-rank terms are not
}
MIB = 2**20


@dataclass
class Run:
    """A module that trains, and records for it."""

    module: GradientEditor
    optimizer: torch.optim.Optimizer
    records: list[EditRecord]


@dataclass
class Subject:
    """A run with the batch of its next step, and the same batch edit by edit."""

    run: Run
    batch: EditBatch
    single: list[EditBatch]

    @property
    def module(self) -> GradientEditor:
        return self.run.module


def build(given: argparse.Namespace) -> Run:
    """The module of a shipped config, calibrated, and moved from its start, where most gradients are zero."""
    model = "--model.init_args.backbone."
    more = [] if given.model == "smollm2" else [f"{model}overrides={json.dumps(RANDOM)}"]
    config = CONFIGS[given.model][given.method]
    cli = parsed(
        [f"--config={config}", f"--data.init_args.train={json.dumps([FACTS])}", f"{model}dtype={given.dtype}", *more]
    )
    module: Any = cli.model
    module.configure_model()
    module.deltas.backbone.model.to(given.device)
    module.to(given.device)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.deltas.network.parameters():
            if not any(p is rate for rate in module.deltas.network.rates()):
                p += 1e-3 * torch.randn(p.shape, generator=draw).to(p)
    data: Any = cli.datamodule
    found = load(data.train, data.cache_dir)
    count = min(len(found), max(64, 2 * max(given.edits)))
    fits = module.collator().fits
    records = [r for r in found.records(random.Random(0).sample(range(len(found)), count)) if fits(r)]
    module.calibrate(records[:32])
    return Run(module, module.configure_optimizers()["optimizer"], records)


def subject(run: Run, edits: int) -> Subject:
    slots = [Slot(record, i, i) for i, record in enumerate(run.records[:edits])]
    batch = run.module.collator()(slots).to(run.module.deltas.backbone.device)
    return Subject(run, batch, [alone(batch, pool) for pool in range(batch.pools)])


def alone(batch: EditBatch, pool: int) -> EditBatch:
    """One pool of a batch, without the padding that the others need."""

    def cut(chosen: Tensor, *tensors: Tensor) -> list[Tensor]:
        width = int(tensors[1][chosen].sum(1).max())
        return [t[chosen, :width].contiguous() for t in tensors]

    mine, asked = batch.edit_pool == pool, batch.query_pool == pool
    edits, edits_mask, edits_answer = cut(mine, batch.edits, batch.edits_mask, batch.edits_answer)
    queries, queries_mask, queries_answer = cut(asked, batch.queries, batch.queries_mask, batch.queries_answer)
    return replace(
        batch,
        edits=edits,
        edits_mask=edits_mask,
        edits_answer=edits_answer,
        edit_pool=batch.edit_pool[mine] * 0,
        edit_seed=batch.edit_seed[mine],
        queries=queries,
        queries_mask=queries_mask,
        queries_answer=queries_answer,
        query_pool=batch.query_pool[asked] * 0,
        in_scope=batch.in_scope[asked],
        pools=1,
    )


# ---------------------------------------------------------------------- the ways


def parallel(subject: Subject) -> None:
    subject.module.losses(subject.batch, training=True)["loss"].backward()


def parallel_materialised(subject: Subject) -> None:
    rows = len(subject.batch.queries) // subject.batch.pools  # of each edit, one after another
    if not torch.equal(subject.batch.query_pool.cpu(), torch.arange(subject.batch.pools).repeat_interleave(rows)):
        raise ValueError("each edit needs as many queries as the others: choose other records")

    @contextmanager
    def whole(model: nn.Module, terms: Mapping[str, LowRank]) -> Iterator[None]:
        changes = {name: LowRank(term.a[::rows], term.b[::rows]).weight() for name, term in terms.items()}

        def adding(change: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:  # [N, d_in, d_out]
            def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0].to(change.dtype).reshape(len(change), -1, change.shape[1])
                return (output + (x @ change).view(output.shape)).to(output.dtype)

            return add

        with hooked(model, {name: adding(change) for name, change in changes.items()}):
            yield

    with patch(f"{GradientEditor.__module__}.{low_rank.__name__}", whole):
        parallel(subject)


def loop(subject: Subject) -> None:
    for batch in subject.single:
        (edited_loss(subject.module, batch) / len(subject.single)).backward()


def edited_loss(module: GradientEditor, batch: EditBatch) -> Tensor:
    """The loss of one edit, whose change of weights is added to them."""
    config, model = module.loss, module.deltas.backbone.model
    decoder, head = model.base_model, model.get_output_embeddings()
    factors = factors_of(module, batch)
    module.deltas.network.observe(factors)
    deltas, penalties = module.deltas.network(factors, batch.edit_seed)
    names = {part: name for name, part in decoder.named_modules()}
    weights = {}
    for name, delta in deltas.items():
        layer, change = linear(model, name), delta.a.T @ delta.b  # [d_in, d_out]
        change = change.T if isinstance(layer, nn.Linear) else change
        weights[f"{names[layer]}.weight"] = (layer.weight + change).to(layer.weight.dtype)
    ids, mask = batch.queries, batch.queries_mask
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    hidden = functional_call(decoder, weights, kwargs=given).last_hidden_state
    outside = ~batch.in_scope
    with torch.no_grad():
        unedited = hidden.clone()
        if outside.any():
            before = decoder(input_ids=ids[outside], attention_mask=mask[outside], use_cache=False)
            unedited[outside] = before.last_hidden_state
    loss = sum((penalty.sum() for penalty in penalties.values()), torch.zeros((), device=ids.device))
    for row, inside in enumerate(batch.in_scope.tolist()):
        on_answer = inside or config.locality_on == "answer"
        at = (batch.queries_answer if on_answer else mask)[row, 1:].nonzero()[:, 0]
        after = head(hidden[row, at]).float().log_softmax(-1)  # [n, V]
        if inside:
            nll = -after[torch.arange(len(at)), ids[row, at + 1]]
            loss = loss + config.edit_weight / module.queries.generality * nll.mean()
        else:
            with torch.no_grad():
                before = head(unedited[row, at]).float().log_softmax(-1)
            p, q = (before, after) if config.locality_direction == "forward" else (after, before)
            kl = (p.exp() * (p - q)).sum(-1)
            loss = loss + config.locality_weight / module.queries.locality * kl.mean()
    return loss


def factors_of(module: GradientEditor, batch: EditBatch) -> dict[str, Factors]:
    """The factors of one edit's weight gradients, which are made too."""
    model = module.deltas.backbone.model
    layers = {name: linear(model, name) for name in module.deltas.names}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = given[0].detach(), output

    hooks = [
        layer.register_forward_hook(lambda _, given, output, name=name: keep(name, given, output))
        for name, layer in layers.items()
    ]
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    try:
        hidden = model.base_model(input_ids=batch.edits, attention_mask=batch.edits_mask, use_cache=False)
        at = batch.edits_answer[0, 1:].nonzero()[:, 0]
        after = model.get_output_embeddings()(hidden.last_hidden_state[0, at]).float().log_softmax(-1)
        loss = -after[torch.arange(len(at)), batch.edits[0, at + 1]].mean()
        found = torch.autograd.grad(loss, [*outputs.values(), *weights])
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return {
        name: Factors(inputs[name].float(), u.float(), (u != 0).any(-1) & (inputs[name] != 0).any(-1))
        for name, u in zip(outputs, found, strict=False)
    }


WAYS: dict[str, Callable[[Subject], None]] = {
    "parallel": parallel,
    "loop": loop,
    "parallel, materialised": parallel_materialised,
}


def step(way: str, subject: Subject) -> None:
    """One optimizer step."""
    subject.run.optimizer.zero_grad()
    WAYS[way](subject)
    subject.module.deltas.network.commit()
    subject.run.optimizer.step()


# ---------------------------------------------------------------------- the same, how fast, how much


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
