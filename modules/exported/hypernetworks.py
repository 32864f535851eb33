"""Editors with a hypernetwork: editor.safetensors holds it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from modules.backbone import BackboneConfig
from modules.exported.files import Kind, fill_tensors, load_tensors
from modules.hypernetwork.module import EditedLayers, GradientEditor
from modules.trained.ibke import IBKE
from modules.trained.mend import MEND

METHODS: dict[str, type[GradientEditor]] = {kind.method: kind for kind in (MEND, IBKE)}


def _write_network(module: GradientEditor, folder: Path) -> dict[str, Any]:
    state = module.deltas.network.state_dict()
    save_file({n: t.detach().cpu().contiguous() for n, t in state.items()}, folder / "editor.safetensors")
    return {
        "backbone": asdict(module.backbone_config),
        "layers": asdict(module.layers),
        "settings": module.settings(),
    }


def _build_network(folder: Path, facts: dict[str, Any]) -> GradientEditor:
    return METHODS[facts["editor"]].of(
        BackboneConfig(**facts["backbone"]), EditedLayers(**facts["layers"]), facts["settings"]
    )


def _fill_network(module: GradientEditor, folder: Path) -> None:
    saved = load_tensors(folder / "editor.safetensors")
    network = module.deltas.network
    fill_tensors(network, saved, set(network.state_dict()), folder)
    module.deltas.requires_grad_(False).eval()


HYPERNETWORKS = Kind(_write_network, _build_network, _fill_network)
