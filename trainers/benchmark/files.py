"""The file of a cell: what was found beside what it is of, whole at any time.

It is written at each number of edits that a cell reaches, by the process that is at it: one that is killed leaves what
may have taken hours. Until the cell is finished its file has an `error`, and the next call runs it again.
"""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from modules.backbone import Backbone
from modules.export import versions
from trainers.benchmark.grid import Cell
from trainers.provenance import hardware
from trainers.written import write_json

UNFINISHED = "it was broken off, or is still running"


@dataclass(frozen=True)
class Files:
    """The files of a benchmark's cells, for any of its processes.

    Args:
        out: the benchmark's folder.
        code: of today, see `trainers.result_cache.code`.
        command: that the user gave.
    """

    out: Path
    code: str
    command: str

    def write(self, cell: Cell, backbone: Backbone, result: dict[str, Any]) -> None:
        """Write a cell's result, as far as it is.

        One with an `error` never takes the place of a finished cell, which another run may have written meanwhile, nor
        of an earlier try that reached more: that stays, with the new error.

        Args:
            result: see `trainers.benchmark.cell.run_cell`, or an `error` alone.
        """
        made = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(backbone.device)}
        told = {"key": cell.key(), "code": self.code, **made, **self.about(cell, backbone), **result}
        if "error" in result and (before := self.read(cell)) is not None:
            if "error" not in before:
                return
            if len(before.get("points", ())) > len(result.get("points", ())):
                told = before | {"error": result["error"]}
        write_json(cell.file(self.out), told)

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell's file tells, where it is there and of the same setup."""
        try:
            found = json.loads(cell.file(self.out).read_text(encoding="utf-8"))
            same = cell.holds(found)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return found if same else None

    def about(self, cell: Cell, backbone: Backbone) -> dict[str, Any]:
        """What a cell is of, in words for readers of its file."""
        return {
            "dataset": cell.dataset,
            "editor": cell.editor,
            "mode": cell.mode,
            "batch": cell.batch,
            "edits": list(cell.edits),
            "asked": cell.asked,
            "protocol": cell.about["protocol"],
            "queries_per_kind": cell.queries_per_kind,
            "seed": cell.about["seed"],
            "batch_size": cell.batch_size,
            "facts": cell.facts,
            "files": cell.files,
            "backbone": asdict(backbone.config),
            "versions": versions(),
            "command": self.command,
        }
