"""SERAC: the counterfactual model and the classifier's encoder as plain transformers models, each in a folder.

counterfactual/    config.json, model*.safetensors, tokenizer files
scope/             the same, of the encoder
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from modules.backbone import BackboneConfig
from modules.exported.files import Kind
from modules.serac.encoder import EncoderConfig
from modules.serac.scope import ScopeConfig
from modules.trained.serac import SERAC

COUNTERFACTUAL, SCOPE = "counterfactual", "scope"


def _write_serac(module: SERAC, folder: Path) -> dict[str, Any]:
    model, encoder = module.serac, module.serac.scope.encoder
    model.counterfactual.model.save_pretrained(folder / COUNTERFACTUAL)
    model.counterfactual.tokenizer.save_pretrained(folder / COUNTERFACTUAL)
    encoder.model.save_pretrained(folder / SCOPE)
    encoder.tokens.tokenizer.save_pretrained(folder / SCOPE)
    found = EncoderConfig(SCOPE, encoder.pooling, encoder.normalise, encoder.config.max_tokens)
    return {
        "backbone": asdict(module.backbone_config),
        "counterfactual": {"source": COUNTERFACTUAL, "attention": module.counterfactual.attention},
        "counterfactual_of": module.counterfactual.source,
        "scope": asdict(replace(module.scope, encoder=found)),
        "scope_of": module.scope.encoder.source,
        "soft": module.soft,
    }


def _build_serac(folder: Path, facts: dict[str, Any]) -> SERAC:
    for part in (COUNTERFACTUAL, SCOPE):
        if not any((folder / part).glob("*.safetensors")):
            raise ValueError(f"{folder / part} has no safetensors")
    counterfactual, scope = dict(facts["counterfactual"]), dict(facts["scope"])
    encoder = EncoderConfig(**scope.pop("encoder"))
    return SERAC(
        BackboneConfig(**facts["backbone"]),
        BackboneConfig(str(folder / counterfactual.pop("source")), **counterfactual),
        ScopeConfig(replace(encoder, source=str(folder / encoder.source)), **scope),
        soft=facts["soft"],
    )


def _fill_serac(module: SERAC, folder: Path) -> None:
    module.serac.requires_grad_(False)  # its folders are plain models: loaded as such


SERACS = Kind(_write_serac, _build_serac, _fill_serac)
