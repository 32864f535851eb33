"""A small InComeS."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modules.backbone import BackboneConfig
from modules.gist.batch import QueryConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions


@pytest.fixture
def build(tiny_config: Callable[..., BackboneConfig]) -> Callable[..., InComeS]:
    def make(kind: str = "llama", **options: Any) -> InComeS:
        torch.manual_seed(0)
        options.setdefault("queries", QueryConfig(per_record=3))
        if options.get("train") == "lora":
            options.setdefault("lora", LoraOptions(4, 8, ["q_proj", "k_proj", "v_proj", "down_proj"]))
        module = InComeS(tiny_config(kind, tie_word_embeddings=True), **options)
        module.configure_model()
        module.gists.train()
        with torch.no_grad():  # away from the start, where student and teacher agree
            for p in module.gists.parameters():
                if p.requires_grad:
                    p += 0.02 * torch.randn_like(p)
        return module

    return make
