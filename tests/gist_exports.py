"""A small InComeS with random weights, exported, and records to edit it with."""

from pathlib import Path
from typing import Any, Literal

import torch

from modules.backbone import BackboneConfig
from modules.export import export
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 700,
}
DATA = '--data=[{"format": "facts", "options": {"split": "test"}, "limit": 40}]'


def export_gists(
    folder: Path, selection: Literal["qk", "hidden", "both"], config: dict[str, Any] | None = None
) -> Path:
    """Write an export of random weights to a folder, with the `config` of its training."""
    torch.manual_seed(0)
    module = InComeS(BackboneConfig("random:llama", overrides=SHAPE), GistConfig(selection=selection))
    module.configure_model()
    export(module, folder, config)
    return folder
