"""Tiny random models and records that many tests share."""

import os

# as launch/test.sh has it, for processes that tests start, too: before torch is imported, since runs that are compared
# bit by bit need as many threads
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.gist.model import GistConfig, GistModel

# 4 layers, so that two of them take part; large weights, so that a wrong mask or position shows
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "initializer_range": 0.2, "n_positions": 256}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": {k: v for k, v in _LLAMA.items() if k != "head_dim"},
    "qwen3": _LLAMA,
    "gpt2": _GPT,
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k not in ("head_dim", "num_key_value_heads")},
    "gptj": _GPT | {"rotary_dim": 4},
}


def random_config(kind: str = "llama", **overrides: Any) -> BackboneConfig:
    return BackboneConfig(f"random:{kind}", overrides=SHAPES[kind] | overrides)


def random_backbone(kind: str = "llama", **overrides: Any) -> Backbone:
    torch.manual_seed(0)
    backbone = load_backbone(random_config(kind, **overrides))
    for p in backbone.model.parameters():  # biases and norms too: zeros and ones hide mistakes
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return backbone


@pytest.fixture
def tiny_config() -> Callable[..., BackboneConfig]:
    """A config by model type: tiny_config("qwen3", num_hidden_layers=2)."""
    return random_config


@pytest.fixture
def tiny() -> Callable[..., Backbone]:
    """A random 4-layer backbone by model type: tiny("qwen3")."""
    return random_backbone


@pytest.fixture
def tiny_gists() -> Callable[..., GistModel]:
    """A random gist model, in eval mode: tiny_gists("qwen3", selection="hidden"); `backbone` gives overrides."""

    def make(kind: str = "llama", backbone: dict[str, Any] | None = None, **switches: Any) -> GistModel:
        model = GistModel(random_backbone(kind, **(backbone or {})), GistConfig(**switches))
        if model.matcher is not None:  # sharp, so that what is found matters
            model.matcher.whiten(model.language_model.get_input_embeddings().weight.detach())
        return model.eval()

    return make


@pytest.fixture
def records() -> list[EditRecord]:
    """Four records with every kind of query; subjects A to D."""
    return [
        EditRecord(
            id=f"made/{s}",
            requests=(EditRequest(f"City {s} is in", f"Land {i}", f"City {s}"),),
            rephrases=(Query(f"Where is City {s}? In", (f"Land {i}",)), Query(f"City {s} lies in", (f"Land {i}",))),
            locality={"near": (Query(f"Village {s} is in", ("Peru",)),)},
            portability={"hop": (Query(f"The flag over City {s} is that of", (f"Land {i}",)),)},
        )
        for i, s in enumerate("ABCD")
    ]
