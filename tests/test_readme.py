"""The commands of READMEs and of the configs' heads are taken by their own parsers; files that are named are there."""

import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from itertools import takewhile
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from trainers.cli import TrainingCLI, resolve_configs
from trainers.command import appended, parser_of
from trainers.estimate.command import _own

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "configs" / "README.md", ROOT / "tests" / "benchmarks" / "smollm2" / "README.md"]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
COMMAND = re.compile(r"python -m trainers\.(\w+)([^\n`|]*)")
# these pass on to trainers.fit
SCRIPT = re.compile(r"(?:bash|sbatch) launch/(?:torchrun\.sh|slurm\.sbatch)()( --[^\n`|]*)")
PLACEHOLDERS = {
    "--config NAME_OR_PATH [--config another.yaml] [": "--config mend_tiny --config zero2.yaml ",
    " ...]": "",
    "--config NAME": "--config mend_tiny",
    "${editor}": "mend",
}


def commands(path: Path) -> set[tuple[str, str]]:
    """(module, arguments) of every command of a page's text or of a config's comments; a continued line is one."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".yaml":
        lines = [line.removeprefix("#") for line in lines if line.startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for placeholder, value in PLACEHOLDERS.items():
        text = text.replace(placeholder, value)
    found = [match.groups() for pattern in (COMMAND, SCRIPT) for match in pattern.finditer(text)]
    return {(name or "fit", shlex.join(shlex.split(given, comments=True))) for name, given in found}


FOUND = sorted(set().union(*map(commands, [*PAGES, *CONFIGS])))
GIVEN = [(name, given) for name, given in FOUND if given]  # the others only speak of a command


class NothingBuilt(TrainingCLI):
    def instantiate_classes(self) -> None:
        pass


@cache
def training() -> ArgumentParser:
    return NothingBuilt(["--config=incomes_tiny"]).parser


@cache
def parser(name: str) -> ArgumentParser:
    return parser_of(getattr(import_module(f"trainers.{name}"), name))


def parse(name: str, args: Sequence[str]) -> None:
    """As the command does before it runs anything."""
    if name == "estimate":
        _, args = _own().parse_known_args(args)
    if name in ("fit", "estimate"):
        training().parse_args(resolve_configs([arg for arg in args if arg != "--dry_run"]))
        return
    if name == "compare":
        files = list(takewhile(lambda word: not word.startswith("--"), args))
        args = [f"--files=[{','.join(files)}]", *args[len(files) :]]
    parser(name).parse_args(appended(resolve_configs(args), getattr(import_module(f"trainers.{name}"), name)))


def test_there_are_commands_to_check() -> None:
    assert "@@" not in README
    assert len(commands(PAGES[0])) >= 20
    asked = {"ability", "compare", "edit", "estimate", "evaluate", "export", "fit", "moments"}
    assert {name for name, _ in GIVEN} >= asked
    assert all(commands(path) for path in CONFIGS if path.parent.name != "training_free")


@pytest.mark.parametrize(("name", "given"), GIVEN, ids=lambda text: text[:60])
def test_a_command_is_taken(name: str, given: str) -> None:
    parse(name, shlex.split(given))


@pytest.mark.parametrize("name", sorted({name for name, _ in FOUND}))
def test_a_command_is_there(name: str) -> None:
    assert import_module(f"trainers.{name}")


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("fit", "--config mend_tiny --trainer.max_step 3"),
        ("estimate", "--config mend_tiny --gpu_s 8"),
        ("export", "--run_dir runs/NAME --out DIR --best"),
        ("evaluate", "--config evaluate_facts --record 3"),
    ],
)
def test_a_wrong_one_is_not(name: str, given: str) -> None:
    with pytest.raises(SystemExit):
        parse(name, shlex.split(given))


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+\.(?:md|png))\)", README))))
def test_a_linked_file_is_there(path: str) -> None:
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:trainers|modules|datamodules)/[\w/]+\.py)`", README))))
def test_a_file_of_the_guided_tour_is_there(path: str) -> None:
    assert (ROOT / path).is_file()
