"""Evaluations of editors on four cities, as `trainers.evaluate` runs them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from rich.console import Console

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from trainers.editors import Chosen
from trainers.evaluation_run import run_evaluation
from trainers.protocols import Judging
from trainers.report import Report

RECORDS = [
    EditRecord(
        name,
        (EditRequest(f"{name} is in", "Peru", name),),
        rephrases=(Query(f"Where is {name}? In", ("Peru",)),),
        locality={"far": (Query("2 + 2 =", ("four",)),)},
        portability={"hop": (Query(f"People of {name} speak", ("Spanish",)),)},
    )
    for name in ("Lyon", "Oslo", "Nice", "Bonn")
]


class Failing(Editor):
    """Fails with more than two edits."""

    name = "failing"

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Edited]:
        if len(requests) > 2:
            raise ValueError("at most two edits")
        yield Edited(backbone)


def chosen(*editors: Editor) -> list[Chosen]:
    return [Chosen(editor, {"name": editor.name}) for editor in editors]


def run(backbone: Backbone, out: Path, editors: Sequence[Editor], exact_match: bool = False) -> tuple[Report, str]:
    screen = StringIO()
    console = Console(file=screen, width=100)
    report = run_evaluation(
        chosen(*editors),
        backbone,
        RECORDS,
        [2, 4],
        Judging(exact_match=exact_match),
        out,
        data="four cities",
        seed=3,
        console=console,
    )
    return report, screen.getvalue()
