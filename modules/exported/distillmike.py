"""DistillMIKE: one peft adapter that holds the start as well, which `PeftModel.from_pretrained` loads onto the model.

adapter_config.json, adapter_model.safetensors     start and adapters
start/                                             the start alone, as `trainers.edit --save` has it; absent without one
edits.json                                         the edits that were distilled
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.records import EditRequest
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.distill.editor import DistilledEditor
from modules.distill.start import as_sum, as_term, keep
from modules.exported.files import Kind, load_tensors
from modules.interventions import shape
from modules.summed import Summed
from modules.trained.distillmike import DistillMIKE

_ROOT = "base_model.model."  # before a layer's name, in peft's files


@dataclass
class _Folder:
    """What is read of an export; `modules.export.load_editor` asks it for the editor."""

    backbone: Backbone
    loaded: DistilledEditor | None = None

    def editor(self) -> DistilledEditor:
        assert self.loaded is not None
        return self.loaded


def _write(module: DistillMIKE, folder: Path) -> dict[str, Any]:
    terms = {name: as_term(t.to(torch.device("cpu")).change()) for name, t in module.student.terms().items()}
    config = module.adapters.peft()
    config.base_model_name_or_path = module.backbone_config.source
    config.inference_mode = True
    # a term of rank r is an adapter of rank r whose product is not scaled
    config.target_modules = list(terms)  # type: ignore[assignment]
    config.rank_pattern = {name: t.a.shape[1] for name, t in terms.items()}
    config.alpha_pattern = {name: t.a.shape[1] for name, t in terms.items()}
    config.save_pretrained(str(folder))
    flat = {}
    for name, t in terms.items():
        flat[f"{_ROOT}{name}.lora_A.weight"] = t.a[0].contiguous()  # [r, d_in]
        flat[f"{_ROOT}{name}.lora_B.weight"] = t.b[0].T.contiguous()  # [d_out, r]
    save_file(flat, folder / "adapter_model.safetensors", {"format": "pt"})
    if start := module.student.start:
        keep({name: t.change() for name, t in start.items()}, module.requests, folder / "start")
    edits = [asdict(r) for r in module.requests]
    (folder / "edits.json").write_text(json.dumps(edits, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    return {"backbone": asdict(module.backbone_config), "adapters": asdict(module.adapters), "edits": len(edits)}


def _build(folder: Path, facts: dict[str, Any]) -> _Folder:
    return _Folder(load_backbone(BackboneConfig(**facts["backbone"])))


def _fill(read: _Folder, folder: Path) -> None:
    """Read adapter and edits.

    Raises:
        ValueError: where one is missing, or does not fit the model; it names the folder.
    """
    saved = load_tensors(folder / "adapter_model.safetensors")
    file = folder / "edits.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no {file.name}; export again")
    requests = [EditRequest(**r) for r in json.loads(file.read_text(encoding="utf-8"))]
    names = dict.fromkeys(key.removeprefix(_ROOT).partition(".lora_")[0] for key in saved)
    terms = {name: _term(saved, name, folder) for name in names}
    for name, term in terms.items():
        if shape(read.backbone.model, name) != term.shape:
            raise ValueError(f"{folder}: the adapter of {name} is of a model of another size")
    read.loaded = DistilledEditor(read.backbone, requests, terms)


def _term(saved: dict[str, Tensor], name: str, folder: Path) -> Summed:
    try:
        a, b = (saved[f"{_ROOT}{name}.lora_{part}.weight"] for part in "AB")
    except KeyError as error:
        raise ValueError(f"{folder}: adapter_model.safetensors lacks {error}; export again") from error
    return as_sum(a.float(), b.T.float())  # a file may have been cast; a change of weights is computed in 32 bits


DISTILLED = Kind(_write, _build, _fill)
