"""A trained editor as a folder, and back.

The folder holds, as safetensors and JSON alone:

    editor.json                                        which editor it is, backbone, switches, data, versions, metrics
    editor.safetensors                                 what was trained: a hypernetwork (MEND, IBKE); gist token,
                                                       selection, encoder (InComeS)

and of InComeS

    config.json, model*.safetensors, tokenizer files   the model that answers, a plain transformers model
    adapter_config.json, adapter_model.safetensors     instead of it, where adapters were trained (peft's format)
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modules.backbone import BackboneConfig
from modules.gist.editor import GistEditor
from modules.gist.model import GistConfig
from modules.hypernetwork.editor import DeltaEditor
from modules.hypernetwork.module import EditedLayers, GradientEditor
from modules.trained.ibke import IBKE
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions
from modules.trained.mend import MEND

FORMAT = 1
_ENCODER = "language_model."


def versions() -> dict[str, str]:
    """What a result or an export was made with."""
    found = {}
    for name in ("palimpsest", "torch", "lightning", "transformers", "peft", "deepspeed", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


class Kind(NamedTuple):
    """How one sort of trained editor is written and read.

    Args:
        write: write all files but editor.json, and return what `build` needs of it.
        build: the untrained module, from what editor.json of a folder tells.
        fill: read the trained tensors of the folder into the module.
    """

    write: Callable[[Any, Path], dict[str, Any]]
    build: Callable[[Path, dict[str, Any]], Any]
    fill: Callable[[Any, Path], None]


def export(module: L.LightningModule, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a trained module to a folder. `about`: data, metrics and whatever else editor.json should tell.

    Raises:
        FileExistsError: where the folder has something in it.
        TypeError: for a module that is no editor known here.
    """
    name = next((name for name, kind in MODULES.items() if isinstance(module, kind)), None)
    if name is None:
        raise TypeError(f"{type(module).__name__} cannot be exported; there are: {', '.join(MODULES)}")
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        "format": FORMAT,
        "editor": name,
        **_kind(name).write(module, folder),
        "versions": versions(),
        **(about or {}),
    }
    (folder / "editor.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_editor(folder: Path | str) -> GistEditor | DeltaEditor:
    """The editor in a folder that `export` wrote.

    Raises:
        ValueError: where the folder is none, or a file is missing or does not fit; it names the file.
    """
    folder = Path(folder)
    file = folder / "editor.json"
    if not file.is_file():
        raise ValueError(
            f"{folder} is no exported editor: it has no editor.json. Make one with `python -m trainers.export`"
        )
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT or facts["editor"] not in MODULES:
            raise ValueError(f"format {facts['format']!r} of editor {facts['editor']!r} is not known here")
        kind = _kind(facts["editor"])
        module = kind.build(folder, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}; export again") from error
    kind.fill(module, folder)
    return module.editor()


# ---------------------------------------------------------------------- editors with a hypernetwork


def _write_network(module: GradientEditor, folder: Path) -> dict[str, Any]:
    state = module.deltas.network.state_dict()
    save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / "editor.safetensors")
    return {
        "backbone": asdict(module.backbone_config),
        "layers": asdict(module.layers),
        "settings": module.settings(),
    }


def _build_network(folder: Path, facts: dict[str, Any]) -> GradientEditor:
    kind = MODULES[facts["editor"]]
    assert issubclass(kind, GradientEditor)
    return kind.of(BackboneConfig(**facts["backbone"]), EditedLayers(**facts["layers"]), facts["settings"])


def _fill_network(module: GradientEditor, folder: Path) -> None:
    saved = _load(folder / "editor.safetensors")
    network = module.deltas.network
    _fill(network, saved, set(network.state_dict()), folder)
    module.deltas.requires_grad_(False).eval()


# ---------------------------------------------------------------------- InComeS


def _write_gists(module: InComeS, folder: Path) -> dict[str, Any]:
    if module.train_part == "lora":
        _save_adapter(module, folder)
    else:
        module.gists.reader.model.save_pretrained(folder)
        _plain_config(folder, module.backbone_config)
    module.tokenizer.save_pretrained(folder)
    save_file(_own_tensors(module), folder / "editor.safetensors")
    return {
        "backbone": asdict(module.backbone_config),
        "gist": asdict(module.gist_config),
        "train": module.train_part,
        "reader": module.reader,
        "lora": asdict(module.lora),
    }


def _build_gists(folder: Path, facts: dict[str, Any]) -> InComeS:
    backbone = BackboneConfig(**facts["backbone"])
    if facts["train"] != "lora":
        backbone = BackboneConfig(str(folder), backbone.dtype, backbone.attention)
    return InComeS(
        backbone,
        GistConfig(**facts["gist"]),
        train=facts["train"],
        reader=facts["reader"],
        lora=LoraOptions(**facts["lora"]),
    )


def _fill_gists(module: InComeS, folder: Path) -> None:
    lora = module.train_part == "lora"
    saved = _load(folder / "editor.safetensors")
    model = module.gists
    if lora:
        adapter = _load(folder / "adapter_model.safetensors")
        saved |= {_ENCODER + _from_peft(name): t for name, t in adapter.items()}
    wanted = set(_trained(module))
    if not lora and module.reader == "student":
        wanted = {n for n in wanted if not n.startswith(_ENCODER)}  # it is the plain model, loaded already
    _fill(model, saved, wanted, folder)
    model.requires_grad_(False).eval()


MODULES: dict[str, type[L.LightningModule]] = {"incomes": InComeS, MEND.method: MEND, IBKE.method: IBKE}
GISTS = Kind(_write_gists, _build_gists, _fill_gists)
NETWORK = Kind(_write_network, _build_network, _fill_network)


def _kind(name: str) -> Kind:
    return NETWORK if issubclass(MODULES[name], GradientEditor) else GISTS


def _load(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}; export again")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}; export again") from error


def _trained(module: InComeS) -> dict[str, Tensor]:
    """Trained tensors of the gist model by name, as a checkpoint holds them."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {n.removeprefix("model."): tensors[n].detach().cpu().contiguous() for n in sorted(module.trained_names())}


def _own_tensors(module: InComeS) -> dict[str, Tensor]:
    """What the plain model, or the adapter, does not hold."""
    elsewhere = module.train_part == "lora" or module.reader == "student"
    return {n: t for n, t in _trained(module).items() if not (elsewhere and n.startswith(_ENCODER))}


def _save_adapter(module: InComeS, folder: Path) -> None:
    language_model = module.gists.language_model
    config = module.adapter_config(module.gists.backbone)
    config.base_model_name_or_path = module.backbone_config.source
    config.task_type = "CAUSAL_LM"
    state = get_peft_model_state_dict(language_model, adapter_name="default", state_dict=_adapter_state(language_model))
    save_file(
        {f"base_model.model.{n}": t.cpu().contiguous() for n, t in state.items()}, folder / "adapter_model.safetensors"
    )
    config.save_pretrained(str(folder))


def _adapter_state(language_model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in language_model.state_dict().items() if "lora_" in n}


def _from_peft(name: str) -> str:
    """base_model.model.X.lora_A.weight -> X.lora_A.default.weight"""
    stem, kind = name.removeprefix("base_model.model.").rsplit(".", 1)
    return f"{stem}.default.{kind}"


def _plain_config(folder: Path, backbone: BackboneConfig) -> None:
    """Leave no trace of our attention's name in the exported config."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for key in ("_attn_implementation", "_attn_implementation_internal", "attn_implementation"):
        config.pop(key, None)
    config["_name_or_path"] = backbone.source
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _fill(model: nn.Module, saved: dict[str, Tensor], wanted: set[str], folder: Path) -> None:
    missing, extra = sorted(wanted - set(saved)), sorted(set(saved) - wanted)
    if missing or extra:
        raise ValueError(f"{folder}: tensors do not fit editor.json: missing {missing[:3]}, unknown {extra[:3]}")
    shapes = {n: t.shape for n, t in model.state_dict(keep_vars=True).items()}
    wrong = [n for n, t in saved.items() if t.shape != shapes[n]]
    if wrong:
        raise ValueError(f"{folder}: tensors do not fit editor.json: of another shape {sorted(wrong)[:3]}")
    model.load_state_dict(saved, strict=False)
