"""A report's tables as they are printed."""

import re
from io import StringIO
from typing import Any

from rich.console import Console

from trainers.report import Report
from trainers.report_table import print_table


def printed(report: Report, **how: Any) -> str:
    screen = StringIO()
    print_table(report, Console(file=screen, width=200, **how))
    return screen.getvalue()


def rows(report: Report) -> list[list[str]]:
    """The table below its head, what is printed bold between asterisks."""
    text = printed(report, force_terminal=True, color_system="standard")
    body = re.split(r"\n *\n", text.split("─ \n")[1])[0]
    return [re.sub(r"\x1b\[1m *(.*?)\x1b\[0m", r"**\1**", line).split() for line in body.splitlines()]
