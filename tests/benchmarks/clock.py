"""The time that work on this machine's device takes, and the device's name."""

import time
from collections.abc import Callable
from typing import Any

import torch

CUDA = torch.cuda.is_available()


def clock() -> float:
    """Seconds: on CPU of processor time, which a neighbour on the same core does not take; on CUDA of the clock."""
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """The seconds that a call takes, and what it returns."""
    start = clock()
    found = run()
    return clock() - start, found


def device() -> str:
    return torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
