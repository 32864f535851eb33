"""The shape of a language model without its weights."""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig

from modules.backbone import PARTS, BackboneConfig, _gguf_file, _split

_NOT_SHAPE = ("model_type", "quantization_config", "dtype", "torch_dtype", "_name_or_path", "transformers_version")


def shape_of(config: BackboneConfig) -> BackboneConfig:
    """The same architecture and sizes as a `random:` source, whose model needs nothing to be read.

    Raises:
        ValueError: where the source's config cannot be had, or is of an architecture that is not supported.
    """
    attention = config.attention if config.attention in (None, "eager") else "sdpa"  # whose tensors other kernels share
    kind, name = _split(config.source)
    if kind == "random":
        return replace(config, liger=False, attention=attention)
    try:
        if kind == "gguf":
            file = _gguf_file(name)
            found = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
        else:
            options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
            found = AutoConfig.from_pretrained(name, **options)
    except Exception as error:
        raise ValueError(
            f"the shape of backbone {config.source!r} could not be had: {str(error)[:300]}\nGive --model.init_args."
            "backbone.source a local folder with its config.json, or random:TYPE and its sizes as backbone.overrides."
        ) from error
    if found.model_type not in PARTS:
        raise ValueError(f"backbone {config.source!r} is of type {found.model_type!r}; supported: {', '.join(PARTS)}")
    shape = {k: v for k, v in found.to_dict().items() if k not in _NOT_SHAPE} | config.overrides
    return replace(config, source=f"random:{found.model_type}", overrides=shape, liger=False, attention=attention)
