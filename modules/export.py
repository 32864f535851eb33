"""A trained InComeS as a folder, and back.

The folder holds, as safetensors and JSON alone:

    config.json, model*.safetensors, tokenizer files   the model that answers, a plain transformers model
    adapter_config.json, adapter_model.safetensors     instead of it, where adapters were trained (peft's format)
    editor.safetensors                                 what else was trained: gist token, selection, encoder
    editor.json                                        backbone, switches, data, versions, metrics
"""

import json
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from modules.backbone import BackboneConfig
from modules.gist.editor import GistEditor
from modules.gist.model import GistConfig, GistModel
from modules.trained.incomes import InComeS, LoraOptions

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


def export(module: InComeS, folder: Path, about: dict[str, Any] | None = None) -> None:
    """Write a trained module to a folder. `about`: data, metrics and whatever else editor.json should tell.

    Raises:
        FileExistsError: where the folder has something in it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; choose another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    model = module.gists
    if module.train_part == "lora":
        _save_adapter(module, folder)
    else:
        model.reader.model.save_pretrained(folder)
        _plain_config(folder, module.backbone_config)
    module.tokenizer.save_pretrained(folder)
    save_file(_own_tensors(module), folder / "editor.safetensors")
    facts = {
        "format": FORMAT,
        "editor": "incomes",
        "backbone": asdict(module.backbone_config),
        "gist": asdict(module.gist_config),
        "train": module.train_part,
        "reader": module.reader,
        "lora": asdict(module.lora),
        "versions": versions(),
        **(about or {}),
    }
    (folder / "editor.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_editor(folder: Path | str) -> GistEditor:
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
        if facts["format"] != FORMAT or facts["editor"] != "incomes":
            raise ValueError(f"format {facts['format']!r} of editor {facts['editor']!r} is not known here")
        backbone = BackboneConfig(**facts["backbone"])
        lora = facts["train"] == "lora"
        module = InComeS(
            backbone if lora else BackboneConfig(str(folder), backbone.dtype, backbone.attention),
            GistConfig(**facts["gist"]),
            train=facts["train"],
            reader=facts["reader"],
            lora=LoraOptions(**facts["lora"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error!r}; export again") from error
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
    return module.editor()


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


def _fill(model: GistModel, saved: dict[str, Tensor], wanted: set[str], folder: Path) -> None:
    missing, extra = sorted(wanted - set(saved)), sorted(set(saved) - wanted)
    if missing or extra:
        raise ValueError(f"{folder}: tensors do not fit editor.json: missing {missing[:3]}, unknown {extra[:3]}")
    shapes = {n: t.shape for n, t in model.state_dict(keep_vars=True).items()}
    wrong = [n for n, t in saved.items() if t.shape != shapes[n]]
    if wrong:
        raise ValueError(f"{folder}: tensors do not fit editor.json: of another shape {sorted(wrong)[:3]}")
    model.load_state_dict(saved, strict=False)
