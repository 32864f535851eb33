"""A benchmark of a tiny model, and what it leaves behind."""

import json
from pathlib import Path
from typing import Any

import yaml

FACTS = {"format": "facts", "options": {"split": "test"}}


def config(folder: Path, **more: Any) -> Path:
    """A config of trainers.evaluate with eleven cells, whose results go below the folder; `more` over its keys."""
    given: dict[str, Any] = {
        "backbone": {
            "source": "random:llama",
            "overrides": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
            },
        },
        "benchmark": {
            "out": str(folder / "out"),
            "datasets": {"facts": {"data": [FACTS], "queries_per_kind": 1}},
            "runs": [
                {"mode": "single", "edits": [2]},
                {"mode": "batch", "edits": [2, 4]},
                {"mode": "consecutive", "edits": [2, 4], "batch": 2},
            ],
            "answers": 2,
            "workers": 1,
        },
        "baselines": ["unedited", "icl_right_edit"],
        "editor": [{"editor": "ft_m", "layers": [1], "steps": 3}],
    }
    file = folder / "benchmark_tiny.yaml"
    file.write_text(yaml.safe_dump(given | more))
    return file


def cells(folder: Path) -> dict[str, dict[str, Any]]:
    """What the cells' files tell, by their names."""
    files = sorted((folder / "out" / "cells").rglob("*.json"))
    return {str(f.relative_to(folder / "out" / "cells")): json.loads(f.read_text()) for f in files}
