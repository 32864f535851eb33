"""Worker processes: they end with the process that started them."""

import os
import signal
import subprocess
import sys
from contextlib import suppress

import pytest

from tests.trainers.signalling import ROOT, environment

# One worker holds the interpreter, as native code may; the other one has nothing to do.
SPREADING = """
from functools import partial
from modules.backbone import BackboneConfig
from trainers.workers import Specs, spread

if __name__ == "__main__":
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    specs = Specs(BackboneConfig("random:llama", overrides=shape), (), device="cpu")
    work = partial(exec, "import ctypes, os; print(os.getpid(), flush=True); hold and ctypes.PyDLL(None).sleep(90)")
    list(spread(work, [{"hold": False}, {"hold": True}], specs, 2))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does it on Linux")
def test_workers_end_with_a_parent_that_is_killed() -> None:
    first = subprocess.Popen(
        [sys.executable, "-c", SPREADING], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    workers = [int(first.stdout.readline()) for _ in range(2)]
    try:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate(timeout=20)  # ends once nobody is left who could write
    finally:
        for process in workers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
