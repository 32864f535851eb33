"""InComeS: editor.safetensors holds gist token, selection and, beside an adapter, nothing else; and a plain model or a
peft adapter."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from modules.backbone import BackboneConfig
from modules.exported.files import Kind, fill_tensors, load_tensors
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions

_ENCODER = "language_model."


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
    module = InComeS(
        backbone,
        _switches(facts["gist"]),
        train=facts["train"],
        reader=facts["reader"],
        lora=LoraOptions(**facts["lora"]),
    )
    module.teaches = False
    return module


def _switches(told: dict[str, Any]) -> GistConfig:
    """What an export says of compression and selection; what exports meant that were written before `bos` was said."""
    meant: dict[str, Any] = {} if "bos" in told else {"bos": False}
    if meant and (told["selection"], told["layers"]) == ("both", "all"):
        meant["match_layer"] = 0.0  # it was not heeded
    return GistConfig(**(told | meant))


def _fill_gists(module: InComeS, folder: Path) -> None:
    lora = module.train_part == "lora"
    saved = load_tensors(folder / "editor.safetensors")
    model = module.gists
    if lora:
        adapter = load_tensors(folder / "adapter_model.safetensors")
        saved |= {_ENCODER + _from_peft(name): t for name, t in adapter.items()}
    wanted = set(_trained(module))
    if not lora and module.reader == "student":
        wanted = {n for n in wanted if not n.startswith(_ENCODER)}  # it is the plain model, loaded already
    # what compression never reaches was saved too by exports from before it was known to be idle
    saved = {n: t for n, t in saved.items() if n in wanted or not n.startswith(_ENCODER)}
    fill_tensors(model, saved, wanted, folder)
    model.requires_grad_(False).eval()


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


GISTS = Kind(_write_gists, _build_gists, _fill_gists)
