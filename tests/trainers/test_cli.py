"""The commands as a user types them: bare names, layers, help, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_ends import TINY, ends

from trainers import ability, analyse, command, compare, edit, evaluate, export, moments, scope, speed
from trainers.cli import find_config, parse


def test_bare_names_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in ("incomes_tiny", "incomes_tiny.yaml"):
        assert Path(find_config(given)).name == "incomes_tiny.yaml"
    (tmp_path / "incomes_tiny.yaml").write_text("a: 1")
    assert Path(find_config("incomes_tiny.yaml")) == Path("incomes_tiny.yaml")  # a file at hand goes first
    message, code = ends(parse, ["--config", "incomes_tinny"])
    assert code not in (0, None)
    assert "incomes_tinny" in message
    assert "incomes_smollm2.yaml" in message


def test_configs_are_layered(tmp_path: Path) -> None:
    over = tmp_path / "over.yaml"
    over.write_text("model: {init_args: {optimizer: {lr: 0.5}}}\n", encoding="utf-8")
    cli = parse([*TINY, f"--config={over}", "--model.init_args.optimizer.warmup_steps=7"])
    config = cli.model.optimizer_config  # type: ignore[union-attr]
    assert (config.lr, config.warmup_steps) == (0.5, 7)
    assert cli.model.gist_config.selection == "hidden"  # type: ignore[union-attr]


def test_printed_config_is_the_same_config(tmp_path: Path) -> None:
    printed, code = ends(parse, [*TINY, "--print_config"])
    assert code in (0, None)
    file = tmp_path / "printed.yaml"
    file.write_text(printed, encoding="utf-8")
    again, _ = ends(parse, ["--config", str(file), "--print_config"])
    assert yaml.safe_load(again) == yaml.safe_load(printed)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--misspelt.key=1", "--misspelt.key: no such key; `python -m trainers.fit --help` lists them all"),
        ("--model.init_args.loss.kl_wieght=1", "the nearest is --model.init_args.loss.kl_weight"),
        ("--model.init_args.optimzer.lr=1", "the nearest is --model.init_args.optimizer.lr"),
        ("--model.init_args.lr=1", "--model.init_args.lr: no such key; there are: backbone, gist, queries"),
        ("--model.init_args.optimizer.lr=-1", "error: model.optimizer.lr must be positive and selection_lr not"),
        ("--data.init_args.train=[{format: nope}]", "error: unknown format 'nope'; known formats: auto"),
        ("--data.init_args.pool_sizes=7", "--data.init_args.pool_sizes: expected a list, as [A, B], got 7"),
        ("--model.init_args.optimizer.lr=fast", "--model.init_args.optimizer.lr: expected float, got fast"),
        ("--model.init_args.train=everything", "train: expected one of 'full', 'upper', 'lora', got everything"),
        ("--model.class_path=modules.trained.NoSuchEditor", "no attribute 'NoSuchEditor'"),
        ("--model.init_args.gist.match_layer=2", "match_layer"),
        ("--model.init_args.backbone.attention=flash_attention_2", "set backbone.attention to sdpa"),
        ("--data.init_args.records_per_batch=0", "records_per_batch"),
        ("--data.init_args.train=[{formt: facts}]", "the nearest is --data.init_args.train.format"),
        ("--trainer.max_stepz=3", "the nearest is --trainer.max_steps"),
        ("--trainer.max_step=3", "the nearest is --trainer.max_steps"),  # an abbreviation is no key
        ("--max_steps=3", "the nearest is --trainer.max_steps"),
        ("--optimizer=Adam", "--optimizer: no such key"),  # a module configures its own
        ("--modle.init_args.optimizer.lr=3", "the nearest is --model.init_args.optimizer.lr"),
        ("--trainer.precision=17", "--trainer.precision: expected one of 64, 32, 16 or"),
        (
            "--trainer.callbacks+={class_path: trainers.callbacks.Baselines, init_args: {editorz: []}}",
            "init_args.editors",
        ),
        ("stray", "stray belongs to no key"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(argument: str, said: str) -> None:
    message, code = ends(parse, [*TINY, argument])
    line = message.splitlines()[-1]
    assert code not in (0, None)
    assert line.startswith("error: ")
    assert said in line
    assert "usage" not in message
    assert len(message.splitlines()) <= 2  # the other is Lightning's, of the seed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named_with_the_remedy() -> None:
    _, code = ends(parse, ["--config", "mend_llama1b"])
    assert code.startswith("error: trainer.accelerator is gpu, and PyTorch finds no GPU here.")
    assert "--trainer.accelerator cpu --trainer.devices 1" in code
    small = parse(["--config", "mend_llama1b", "--trainer.accelerator=cpu", "--trainer.devices=1"])
    assert small.trainer.num_devices == 1


def test_a_wrong_config_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "over.yaml"
    wrong = {
        "model: {init_args: {optimizer: {lrr: 1}}}": "--model.init_args.optimizer.lrr: no such key; the nearest is ",
        "data: {init_args: {val_pol: 1}}": "--data.init_args.val_pol: no such key; the nearest is ",
        "trainer: {max_steps: 1": "Problems parsing config",
    }
    for text, said in wrong.items():
        file.write_text(text, encoding="utf-8")
        message, _ = ends(parse, [*TINY, f"--config={file}"])
        assert message.startswith(f"error: {said}")
        assert message.count("\n") == 1
        assert str(file) in message


@pytest.mark.parametrize(
    "function",
    [
        *(evaluate.evaluate, edit.edit, export.export, moments.moments, scope.scope),
        *(analyse.analyse, speed.speed, ability.ability, compare.compare),
    ],
)
def test_help_describes_every_option_and_has_an_example(function: Callable[..., Any]) -> None:
    parser = command.parser_of(function)
    assert [a.dest for a in parser._actions if not (a.help or "").strip()] == []
    said = " ".join(parser.format_help().split())
    assert f"python -m trainers.{function.__name__} --" in said.split("options:")[1].replace(" a.json b.json", " --")
    assert "top of this file" not in said


TRAINED = [f"{editor}_tiny.yaml" for editor in ("incomes", "mend", "ibke", "serac", "distillmike")]


@pytest.mark.parametrize(
    ("main", "configs"),
    [
        *((parse, [config]) for config in TRAINED),
        (parse, ["incomes_tiny.yaml", "zero3_cpu.yaml"]),
        (evaluate.evaluate, ["benchmark_smollm2.yaml"]),
        (ability.ability, ["ability_smollm2.yaml"]),
    ],
)
def test_a_printed_config_explains_every_key(main: Callable[..., Any], configs: list[str]) -> None:
    args = [*(f"--config={config}" for config in configs), "--print_config=comments"]
    printed, code = ends(parse, args) if main is parse else ends(command.run, main, args)
    assert code in (0, None)
    comments = [line.strip() for line in printed.splitlines() if line.strip().startswith("# ")]
    assert sum("(type:" in line for line in comments) > 10
    assert not [line for line in comments if line.startswith("#  (type:")]


def test_other_commands_say_what_is_wrong_in_one_line() -> None:
    wrong = {
        "--run_dri=x": "error: --run_dri: no such key; the nearest is --run_dir\n",
        "--out=x": "error: run_dir must be given, as --KEY VALUE or in a --config; "
        "`python -m trainers.export --help` lists them all\n",
    }
    for argument, said in wrong.items():
        assert ends(command.run, export.export, [argument]) == (said, 2)
    message, _ = ends(command.run, evaluate.evaluate, ["--data={format: facts}", "--data={format: nope}"])
    assert message.startswith("error: unknown format 'nope'; known formats: auto")  # a list, one by one
    assert "\n" not in message
    message, _ = ends(command.run, evaluate.evaluate, ["--backbone=gpt2"])
    assert message == "error: --backbone: expected keys of its own, as {KEY: VALUE}, which --help lists; got gpt2\n"
