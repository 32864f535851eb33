"""The shipped values of the editors that tune or remember: each makes its editor, for every backbone that is named."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import ArgumentParser

from modules import training_free
from modules.editor import Editor

FOLDER = Path(__file__).parents[3] / "configs" / "training_free"
NAMES = ["ft_l", "ft_m", "ft_eac", "lora", "grace", "t_patcher", "kn"]
BACKBONES = {
    "gpt2-xl",
    "gpt-j-6b",
    "gpt-neox-20b",
    "llama-3.2-1b",
    "llama-2-7b",
    "mistral-7b",
    "llama-3-8b",
    "qwen2.5-7b",
    "qwen3-1.7b",
    "qwen3-8b",
    "smollm2-135m",
}


@pytest.mark.parametrize("name", NAMES)
def test_every_backbone_makes_an_editor(name: str) -> None:
    raw: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    kind = getattr(training_free, raw["class_path"].rpartition(".")[2])
    assert kind.name == name
    assert set(raw["backbones"]) == BACKBONES
    for values in ({}, *raw["backbones"].values()):
        arguments = raw["init_args"] | values
        for key, value in values.items():
            if isinstance(value, dict):
                arguments[key] = raw["init_args"][key] | value
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind, "editor")
        editor = parser.instantiate(parser.parse_object({"editor": arguments})).editor
        assert isinstance(editor, Editor)
        for key, value in arguments.items():
            found = getattr(editor, key)
            assert (vars(found) if isinstance(value, dict) else found) == value
