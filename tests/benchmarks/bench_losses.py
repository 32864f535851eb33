"""Time and peak memory of the chunked cross-entropy + KL against whole logits, forward and backward, in one run.

    python tests/benchmarks/bench_losses.py --tokens 2048 --hidden 576 --vocab 49152 --chunk 256 --dtype float32

Runs on CUDA where there is one. Peak memory is what a step adds to what the inputs already hold: allocated bytes on
CUDA, resident bytes on the CPU (Linux; the high-water mark of the process is reset before each step).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.losses import Head, token_ce_and_kl, token_cross_entropy, token_kl

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def whole(h: Tensor, head: Head, labels: Tensor, teacher_h: Tensor, teacher: Head) -> tuple[Tensor, Tensor]:
    logits = F.linear(h, *head).float()  # [n, V]
    with torch.no_grad():
        target = F.linear(teacher_h, *teacher).float().log_softmax(-1)  # [n, V]
    kl = F.kl_div(logits.log_softmax(-1), target, reduction="none", log_target=True).sum(-1)  # [n]
    return F.cross_entropy(logits, labels, reduction="none"), kl


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(step: Callable[[], None], repeats: int) -> tuple[float, float]:
    """Median seconds and largest added GiB of a step, after one to warm up."""
    seconds, added = [], []
    for _ in range(repeats + 1):
        if CUDA:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")
            before = resident("VmRSS")
        start = time.perf_counter()
        step()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        added.append((torch.cuda.max_memory_allocated() if CUDA else resident("VmHWM")) - before)
    return statistics.median(seconds[1:]), max(added[1:]) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 2048, "hidden": 576, "vocab": 49152, "chunk": 256, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)

    h, teacher_h = torch.randn(2, args.tokens, args.hidden, device=DEVICE, dtype=dtype)
    weights = [torch.randn(args.vocab, args.hidden, device=DEVICE, dtype=dtype) * args.hidden**-0.5 for _ in range(2)]
    labels = torch.randint(0, args.vocab, (args.tokens,), device=DEVICE)
    h, head, teacher = h.clone().requires_grad_(), Head(weights[0].requires_grad_()), Head(weights[1])
    batch = (h, head, labels, teacher_h, teacher)

    def apart(h: Tensor, head: Head, labels: Tensor, teacher_h: Tensor, teacher: Head) -> tuple[Tensor, Tensor]:
        return token_cross_entropy(h, head, labels, args.chunk), token_kl(h, head, teacher_h, teacher, args.chunk)

    variants = {
        "whole logits": lambda: whole(*batch),
        "chunked, one walk": lambda: token_ce_and_kl(*batch, chunk=args.chunk),
        "chunked, two walks" + (" (CE by Liger)" if CUDA else ""): lambda: apart(*batch),
    }

    def step(losses: Callable[[], tuple[Tensor, Tensor]]) -> None:
        ce, kl = losses()
        torch.autograd.grad((ce + kl).sum(), (h, head.weight))

    device = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {vars(args)}")
    base: tuple[float, float] | None = None
    for name, losses in variants.items():
        seconds, gib = measure(lambda losses=losses: step(losses), args.repeats)
        base = base or (seconds, gib)
        ratios = f"time x{seconds / base[0]:.2f}  memory x{gib / base[1]:.2f}"
        print(f"{name:34s} {seconds:8.3f} s  {gib:7.3f} GiB   {ratios}")


if __name__ == "__main__":
    main()
