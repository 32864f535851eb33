"""The progress bar of the commands."""

import math
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def bar(console: Console, enabled: bool) -> Progress:
    """A progress bar, where the output is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(compact=True))
    options: dict[str, Any] = {"transient": True, "speed_estimate_period": math.inf}  # a step may take minutes
    return Progress(*columns, console=console, disable=not enabled or not console.is_terminal, **options)
