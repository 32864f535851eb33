"""The lock under which PyTorch compiles an operator, and what to do about one that a killed run has left.

PyTorch makes a file `lock` in the operator's folder, keeps it open while it compiles, and removes it. Every other run
waits, without a word and for ever, until the file is gone (`torch.utils.file_baton`), also where nothing is left to be
compiled. Who is killed in between leaves the file.
"""

import time
from collections.abc import Callable
from pathlib import Path

import psutil
from lightning.pytorch.utilities import rank_zero_warn

SHARED_MEMORY = "deepspeed_shm_comm"  # what DeepSpeed compiles for processors: all it compiles for this project
STALE = 600.0  # seconds: on a slow machine this operator takes a minute or two


def folder_of(operator: str) -> Path:
    """Where PyTorch compiles an operator; TORCH_EXTENSIONS_DIR moves it."""
    from torch.utils.cpp_extension import _get_build_directory

    return Path(_get_build_directory(operator, verbose=False))


def await_lock(folder: Path, stale: float = STALE, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait, aloud, while an operator's lock stands without a process of this machine that holds it.

    A home folder may be shared, and a process of another machine be compiling: then something in the folder changes.
    A lock that is held here is left to PyTorch, which waits as long as its holder lives.

    Args:
        stale: seconds without a change after which nobody is compiling any more.

    Raises:
        ValueError: for a lock that is stale; it names the file and says how to remove it.
    """
    lock, said = folder / "lock", False
    while lock.exists() and not held(lock):
        if (age := unchanged(folder)) >= stale:
            raise ValueError(
                f"{lock} is left from a run that was killed while it compiled: no process of this machine holds it, "
                f"and nothing beside it has changed for {age / 60:.0f} minutes. PyTorch would wait for it for ever. "
                f"Remove it: rm '{lock}'"
            )
        if not said:
            rank_zero_warn(
                f"waiting for {lock}: no process of this machine holds it, but another one's may. If none is "
                f"compiling there, it is left from a run that was killed; remove it: rm '{lock}'. Without a change it "
                f"is taken for stale in {(stale - age) / 60:.0f} minutes"
            )
            said = True
        sleep(1)


def held(file: Path) -> bool:
    """Whether a process of this machine, as far as they may be looked into, has the file open."""
    wanted = str(file.resolve())
    for process in psutil.process_iter():
        try:
            if any(opened.path == wanted for opened in process.open_files()):
                return True
        except (psutil.Error, OSError):  # ended meanwhile, or someone else's
            continue
    return False


def unchanged(folder: Path) -> float:
    """Seconds since anything in a folder, at any depth, was written."""
    times = [folder.stat().st_mtime]
    for path in folder.rglob("*"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # removed meanwhile
            continue
    return abs(time.time() - max(times))  # a clock that was set back, too, leaves a file alone
