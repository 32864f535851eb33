"""The README's commands name modules, configs and flags that exist."""

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"python -m trainers\.\w+[^\n#|`]*", README)))


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 5
    assert "@@" not in README


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_what_there_is(command):
    name = re.search(r"trainers\.(\w+)", command)[1]
    module = import_module(f"trainers.{name}")
    for config in re.findall(r"--config (\S+\.yaml)", command):
        assert config == "another.yaml" or (ROOT / "configs" / config).is_file(), config
    if name == "fit":
        assert set(re.findall(r"--(\w+)[ =]", command)) <= {"config", "ckpt_path", "run_dir", "model"}
    elif name == "estimate":
        assert set(re.findall(r"--(\w+)", command)) <= {"config", "gpus", "gpu", "gpu_memory"}
    else:
        known = set(inspect.signature(getattr(module, name)).parameters) | {"config"}
        assert set(re.findall(r"--(\w+)", command)) <= known


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+\.(?:md|png))\)", README))))
def test_a_linked_file_is_there(path):
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:trainers|modules|datamodules)/[\w/]+\.py)`", README))))
def test_a_file_of_the_guided_tour_is_there(path):
    assert (ROOT / path).is_file()
