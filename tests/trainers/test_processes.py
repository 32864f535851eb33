"""Ranks end with the one that started them, also while they hang; those that something else started do not."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.trainers.signalling import ROOT, environment, run

# As Lightning does it: the first rank starts the second, which then waits for what will not come. The second holds the
# interpreter while it waits, as native code may, so that no thread of Python's could end it.
PAIR = """
import ctypes, os, subprocess, sys, time
from trainers import processes
{prepare}
processes.end_with_parent()
if "LOCAL_RANK" not in os.environ:
    subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[1]], env=os.environ | {{"LOCAL_RANK": "1"}})
    time.sleep(60)
print(os.getpid(), flush=True)
{wait}
"""
HOLDING = "ctypes.PyDLL(None).sleep(60)"
LETTING = "time.sleep(60)"


@contextmanager
def pair(prepare: str = "", wait: str = HOLDING) -> Iterator[tuple[subprocess.Popen, int]]:
    """The first rank, and the second one's process id. Both are gone afterwards."""
    script = PAIR.format(prepare=prepare, wait=wait)
    first = subprocess.Popen(
        [sys.executable, "-c", script, script], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert first.stdout is not None
    second = int(first.stdout.readline())
    try:
        yield first, second
    finally:
        first.kill()
        first.wait()
        with suppress(ProcessLookupError):
            os.kill(second, signal.SIGKILL)
        first.stdout.close()


def ends(first: subprocess.Popen, seconds: float) -> bool:
    """Whether the second rank ends within so many seconds, and with it the output that the two share."""
    try:
        first.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel does it on Linux")
def test_second_rank_dies_with_the_first_even_while_it_hangs() -> None:
    with pair() as (first, _):
        os.kill(first.pid, signal.SIGKILL)
        assert ends(first, 20)


def test_second_rank_dies_where_the_kernel_cannot_help() -> None:
    with pair("processes._kill_at_parents_death = lambda: False", LETTING) as (first, _):
        os.kill(first.pid, signal.SIGKILL)
        assert ends(first, 20)


def test_ranks_of_other_launchers_are_left_alone() -> None:
    """torchrun's processes know no first rank."""
    with pair("os.environ.pop(processes.LEADER, None)", LETTING) as (first, _):
        os.kill(first.pid, signal.SIGKILL)
        assert not ends(first, 2)


def test_first_rank_that_is_dead_already() -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    start = "from trainers.processes import end_with_parent; end_with_parent(); print('goes on')"
    ended = run(sys.executable, "-c", start, LOCAL_RANK="1", PALIMPSEST_LEADER=str(gone.pid))
    assert ended.returncode == 1
    assert "is dead" in ended.stderr
    alive = run(sys.executable, "-c", start, LOCAL_RANK="1", PALIMPSEST_LEADER=str(os.getppid()))
    assert (alive.returncode, alive.stdout) == (0, "goes on\n")  # torchrun, started somewhere below a run


ENDING = """
import atexit, sys
import torch.distributed as dist
from trainers.processes import end_group
atexit.register(print, "at exit")
end_group(3)  # of no group
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=0, world_size=1)
end_group(4)
print("never")
"""


def test_one_of_a_group_ends_at_once(tmp_path: Path) -> None:
    done = run(sys.executable, "-c", ENDING, tmp_path / "group")
    assert (done.returncode, done.stdout) == (4, "at exit\n")
