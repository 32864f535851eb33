"""Seconds and memory of some work, on whatever device the model is on."""

import ctypes
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from modules.backbone import Backbone


def now(backbone: Backbone) -> float:
    """A clock in seconds that waits for the device's queue."""
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)
    return time.perf_counter()


class Meter:
    """Adds up what pieces of work cost.

    Memory is the GPU's where the model is on one, as torch allocates it; else this process's resident set, which lacks
    what reuses pages that the process holds and does not use. Those are given back first, where the C library can.

    Args:
        every: seconds between two looks at the resident set.

    Attributes:
        seconds: of all pieces of work.
        peak: the most bytes that one piece of work held at a time, above what was held before it.
    """

    def __init__(self, backbone: Backbone, every: float = 0.02) -> None:
        self.backbone = backbone
        self.every = every
        self.seconds = 0.0
        self.peak = 0
        if backbone.device.type != "cuda":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
            if trim:
                trim(0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """The work within this `with` counts; nothing does where it fails."""
        memory = _on_gpu if self.backbone.device.type == "cuda" else _resident
        with memory(self.backbone.device, self.every) as found:
            start = now(self.backbone)
            yield
            seconds = now(self.backbone) - start
        self.seconds += seconds
        self.peak = max(self.peak, found[0])


@contextmanager
def _on_gpu(device: torch.device, every: float) -> Iterator[list[int]]:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    yield (found := [0])
    found[0] = torch.cuda.max_memory_allocated(device) - before


@contextmanager
def _resident(device: torch.device, every: float) -> Iterator[list[int]]:
    process, done = psutil.Process(), threading.Event()
    before = process.memory_info().rss
    found = [0]

    def look() -> None:
        found[0] = max(found[0], process.memory_info().rss - before)

    def watch() -> None:
        while not done.wait(every):
            look()

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        look()
