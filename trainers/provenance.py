"""By which command and on what something was measured."""

import platform
import shlex
import sys
from pathlib import Path

import torch


def command_line() -> str:
    """This process's command, with `python -m MODULE` where it was started that way."""
    module = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None)
    start = ["python", "-m", module.removesuffix(".__main__")] if module else ["python", Path(sys.argv[0]).name]
    return shlex.join([*start, *sys.argv[1:]])


def hardware(device: torch.device) -> str:
    """The name of a device, for seconds that mean something: a GPU's, or the processor's with the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    threads = torch.get_num_threads()
    return f"{next(names, platform.machine())}, {threads} thread{'s' * (threads > 1)}"
