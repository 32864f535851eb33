"""What the tests of several files build."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord
from modules.backbone import BackboneConfig
from modules.trained.mend import MEND, MendConfig


@pytest.fixture
def build_mend(tiny_config: Callable[..., BackboneConfig], records: list[EditRecord]) -> Callable[..., MEND]:
    """A calibrated module whose hypernetwork has moved away from its start."""

    def make(kind: str = "llama", moved: bool = True, **options: Any) -> MEND:
        options.setdefault("mend", MendConfig(rank=8, edit_lr=0.02))
        module = MEND(tiny_config(kind), **options)
        module.configure_model()
        module.calibrate(records)
        if moved:
            draw = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for name, p in module.named_parameters():
                    if "edit_lr" not in name:
                        p += 0.05 * torch.randn(p.shape, generator=draw)
        return module

    return make
