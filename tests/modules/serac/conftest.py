"""A random classifier beside two random language models of one vocabulary."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from modules.backbone import Backbone
from modules.serac.encoder import EncoderConfig
from modules.serac.model import SeracModel
from modules.serac.scope import ScopeClassifier, ScopeConfig

BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
}


@pytest.fixture
def encoder_config() -> Callable[..., EncoderConfig]:
    """A random encoder's config: encoder_config(pooling="cls")."""

    def make(**options: Any) -> EncoderConfig:
        return EncoderConfig("random:bert", overrides=BERT, **options)

    return make


@pytest.fixture
def scope_config(encoder_config: Callable[..., EncoderConfig]) -> Callable[..., ScopeConfig]:
    """A random classifier's config, for which only equal texts are alike: scope_config(similarity="cosine")."""

    def make(**options: Any) -> ScopeConfig:
        return ScopeConfig(**({"encoder": encoder_config(), "threshold": 0.99} | options))

    return make


@pytest.fixture
def tiny_serac(tiny: Callable[..., Backbone], scope_config: Callable[..., ScopeConfig]) -> Callable[..., SeracModel]:
    """Random models: tiny_serac(threshold=0.9). The counterfactual one is of another architecture than the base."""

    def make(base: str = "llama", **options: Any) -> SeracModel:
        model = SeracModel(tiny(base), tiny("gpt2", n_layer=2), ScopeClassifier(scope_config(**options)))
        with torch.no_grad():
            for p in model.scope.parameters():  # LayerNorm's ones and zeros hide mistakes
                if p.dim() == 1:
                    p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        return model

    return make
