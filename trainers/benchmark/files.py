"""The file of a cell: what was found beside what it is of, whole at any time.

It is written at each number of edits that a cell reaches, by the process that is at it: one that is killed leaves what
may have taken hours. Until the cell is finished its file has an `error`, and the next call runs it again.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
        origins: where the records of each data set come from: `data`, in words, and `records_available`, how many
            there are.
    """

    out: Path
    code: str
    command: str
    origins: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def write(self, cell: Cell, backbone: Backbone, result: dict[str, Any]) -> bool:
        """Write a cell's result, as far as it is.

        A finished cell of another setting stays, whatever the result. One with an `error` never takes the place of a
        finished cell, which another run may have written meanwhile, nor of an earlier try that reached more: that
        stays, with the new error.

        Args:
            result: see `trainers.benchmark.cell.run_cell`, or an `error` alone; with the `hardware` of the process that
                it is of, by default this one.

        Returns:
            Whether the file now tells of the result.
        """
        there = self.there(cell)
        same = there is not None and cell.holds(there)
        if there is not None and "error" not in there and ("error" in result or not same):
            return False
        made = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        made["hardware"] = result.get("hardware") or hardware(backbone.device)
        told = {"key": cell.key(), "code": self.code, **made, **self.about(cell, backbone), **result}
        further = there is not None and len(there.get("points", ())) > len(result.get("points", ()))
        if there is not None and same and further and "error" in result:
            told = there | {"error": result["error"]}
        write_json(cell.file(self.out), told)
        return True

    def read(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell's file tells, where it is there and of the same setting."""
        found = self.there(cell)
        return found if found is not None and cell.holds(found) else None

    def there(self, cell: Cell) -> dict[str, Any] | None:
        """What the cell's file tells, where it is there, of whatever setting."""
        try:
            found = json.loads(cell.file(self.out).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "key" in found else None

    def about(self, cell: Cell, backbone: Backbone) -> dict[str, Any]:
        """What a cell is of, for readers of its file, and to tell what another cell's differs in."""
        return {
            "dataset": cell.dataset,
            "editor": cell.editor,
            "mode": cell.mode,
            "batch": cell.batch,
            "edits": list(cell.edits),
            "asked": cell.asked,
            "protocol": cell.judging.protocol,
            "judging": cell.judging.told(),
            "queries_per_kind": cell.queries_per_kind,
            "seed": cell.about["seed"],
            "batch_size": cell.batch_size,
            "weights": cell.about["weights"],
            **self.origins.get(cell.dataset, {}),
            "records_hash": cell.records_hash,
            "facts": cell.facts,
            "files": cell.files,
            "backbone": asdict(backbone.config),
            "versions": versions(),
            "command": self.command,
        }
