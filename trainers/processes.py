"""The processes of a run on one machine: how they end, and those that a process has started with it."""

import atexit
import ctypes
import os
import signal
import sys
import threading
import time

import torch.distributed as dist

LEADER = "PALIMPSEST_LEADER"  # names, to the processes that a rank starts, that rank's process id
PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Tie the ranks that Lightning starts beside the first one of a machine to that one.

    To be called first by every rank. When the first one dies, by whatever cause, the others are killed within seconds,
    also while they wait in a collective for what will never come. Ranks that torchrun, srun or a user has started are
    left alone: whoever starts them watches them.

    Raises:
        SystemExit: if the first rank is dead already.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        os.environ[LEADER] = str(os.getpid())
        return
    leader = int(os.environ.get(LEADER, 0))
    if not leader or (leader != os.getppid() and is_alive(leader)):
        return  # started by something else, perhaps somewhere below a run
    tie_to(leader)


def tie_to(parent: int) -> None:
    """Have this process killed within seconds of its parent's death, by whatever cause, also while it waits for what
    will never come, with a GPU's memory in its hands.

    On Linux the parent's thread that has started this process must not end before the parent does.

    Args:
        parent: the process id of the one that has started this one.

    Raises:
        SystemExit: if it is dead already.
    """
    if not _kill_at_parents_death():
        threading.Thread(target=_end_with, args=(parent,), daemon=True, name="end-with-parent").start()
    if parent != os.getppid():  # it died before it was watched
        sys.exit(f"error: the process that started this one ({parent}) is dead")


def end_group(code: int = 0) -> None:
    """End this process at once if it is one of several, after what Python does at exit; else do nothing.

    To be called where nothing is left to do. Threads of the process group now and then abort an interpreter that shuts
    down ("terminate called without an active exception"), and a run that ended well would seem to have failed.
    """
    if dist.is_available() and dist.is_initialized():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_alive(process: int) -> bool:
    """Whether there is a process with this id."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _end_with(parent: int, seconds: float = 1.0) -> None:
    """Look every so many seconds whether `parent` is still this process's parent, and kill this process if not."""
    while os.getppid() == parent:
        time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_at_parents_death() -> bool:
    """Have the kernel do it, which needs no running interpreter. False where the kernel cannot."""
    if not sys.platform.startswith("linux"):
        return False
    return ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL)) == 0
