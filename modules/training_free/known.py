"""Language models that published hyperparameters name, by what their configs say: a local copy is recognised too."""

from typing import NamedTuple

from modules.backbone import Backbone


class Size(NamedTuple):
    """What tells one model from another, whatever folder it lies in."""

    model_type: str
    layers: int
    hidden_size: int
    intermediate_size: int


# a model of the same architecture and size, such as a fine-tuned one, takes the same values; Llama 2 7B and Llama 3 8B
# differ in the width of the MLP alone
KNOWN: dict[str, Size] = {
    "gpt2-xl": Size("gpt2", 48, 1600, 6400),
    "gpt-j-6b": Size("gptj", 28, 4096, 16384),
    "gpt-neox-20b": Size("gpt_neox", 44, 6144, 24576),
    "llama-3.2-1b": Size("llama", 16, 2048, 8192),
    "llama-2-7b": Size("llama", 32, 4096, 11008),
    "mistral-7b": Size("mistral", 32, 4096, 14336),
    "llama-3-8b": Size("llama", 32, 4096, 14336),
    "qwen2.5-7b": Size("qwen2", 28, 3584, 18944),
    "qwen3-1.7b": Size("qwen3", 28, 2048, 6144),
    "qwen3-8b": Size("qwen3", 36, 4096, 12288),
    "smollm2-135m": Size("llama", 30, 576, 1536),
}


def known_as(backbone: Backbone) -> str | None:
    """The name in `KNOWN` of a model of this architecture and size; None where there is none."""
    config = backbone.model.config
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden  # GPT-2, GPT-J
    size = Size(config.model_type, int(config.num_hidden_layers), hidden, int(inner))
    return next((name for name, known in KNOWN.items() if known == size), None)
