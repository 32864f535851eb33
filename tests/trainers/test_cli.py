"""The commands as a user types them: bare names, layers, what is refused, and what is said."""

import io
import pickle
import shlex
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trainers import ability, analyse, command, compare, edit, evaluate, export, fit, moments, scope, speed
from trainers.callbacks.preemption import checkpoints
from trainers.callbacks.save_checkpoints import SaveCheckpoints, write_scores
from trainers.checkpoints.folder import digest, seal, stage
from trainers.checkpoints.single import STATE, FolderIO
from trainers.cli import TrainingCLI, find_config, parse
from trainers.next_steps import next_steps

TINY = ["--config", "incomes_tiny"]


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    """A run of two steps on few records."""
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    return [*TINY, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=2", "--trainer.num_sanity_val_steps=0", *quiet]


def ends(function: Callable[..., Any], *args: Any) -> tuple[str, Any]:
    """What a program says as it ends with an error, and its exit code."""
    said = io.StringIO()
    with pytest.raises(SystemExit) as end, redirect_stderr(said), redirect_stdout(said):
        function(*args)
    message = f"{said.getvalue()}{end.value.code if isinstance(end.value.code, str) else ''}"
    return message, end.value.code


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


def test_fit_export_and_what_is_refused_between(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with redirect_stdout(said):
        fit.main([*quick, "--ckpt_path=last"])
    assert said.getvalue().count("starting from the beginning") == 1
    run = tmp_path / "run"
    assert {"config.yaml", "checkpoints"} <= {p.name for p in run.iterdir()}
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step2.ckpt"]

    message, code = ends(fit.main, quick)
    assert code not in (0, None)
    assert "--ckpt_path last" in message
    message, code = ends(fit.main, [*quick, "--ckpt_path=nowhere.ckpt"])
    assert code not in (0, None)
    assert "nowhere.ckpt" in message

    where, look, *commands = said.getvalue().splitlines()[-4:]  # which can be pasted
    assert where == f"the run is in {run}, its newest checkpoint is {run / 'checkpoints' / 'step2.ckpt'}"
    assert look.split() == ["look", "at", "it:", "tensorboard", "--logdir", str(run)]
    (_, _, *to_export), (_, _, *to_evaluate) = map(shlex.split, commands)
    assert to_export[:3] == ["python", "-m", "trainers.export"]
    assert to_evaluate[:3] == ["python", "-m", "trainers.evaluate"]
    command.run(export.export, to_export[3:])
    out = tmp_path / "exported" / "run"
    assert (out / "editor.json").is_file()
    command.run(evaluate.evaluate, [*to_evaluate[3:], "--records=2", "--exact_match=false", "--baselines=[]"])
    assert (run / "results.json").is_file()
    message, code = ends(command.run, export.export, ["--run_dir", str(run), "--out", str(out)])
    assert code not in (0, None)
    assert "is not empty" in message

    marker = tmp_path / "ran"
    evil = tmp_path / "evil.ckpt"
    FolderIO().save_checkpoint({"state_dict": {}, "global_step": 0, "evil": _Evil(str(marker))}, evil)
    with pytest.raises((pickle.UnpicklingError, SystemExit)):
        command.run(export.export, ["--run_dir", str(run), "--out", str(tmp_path / "o2"), "--checkpoint", str(evil)])
    message, code = ends(fit.main, [*quick, f"--run_dir={tmp_path / 'other'}", f"--ckpt_path={evil}"])
    assert code not in (0, None)
    assert str(evil / STATE) in message
    assert not marker.exists()
    assert not (tmp_path / "o2").exists()


class _Evil:
    """Code that would run when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(self.path),))


def test_what_comes_after_a_run_is_of_the_best_checkpoint_and_in_the_editors_own_mode(tmp_path: Path) -> None:
    cli = TrainingCLI(["--config", "mend_tiny", f"--run_dir={tmp_path}", "--checkpoint.monitor=val/loss"])
    folder = tmp_path / "checkpoints"
    best, newest = save(folder, 1), save(folder, 2)
    checkpoints(cli.trainer).scores = {best.name: 0.1, newest.name: 0.9}
    where, _, to_export, to_evaluate = next_steps(cli).splitlines()
    assert where.endswith(f"{newest}, the best by val/loss is {best}")
    assert "--checkpoint" not in to_export  # the best is taken
    assert to_evaluate.endswith(f" --out {tmp_path / 'results.json'} --mode single")


def test_what_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    best, good, newest = (save(tmp_path, step) for step in (1, 2, 3))
    saves = SaveCheckpoints(str(tmp_path), monitor="val/loss", mode="min", top_k=2)

    def taken(checkpoint: str, saves: SaveCheckpoints = saves) -> tuple[Path, str]:
        return export.chosen(tmp_path, checkpoint, saves), capsys.readouterr().out

    assert taken("best") == (newest, "no checkpoint here has a score by val/loss\ntaking step3.ckpt, the newest\n")
    write_scores(tmp_path, {best.name: 0.1, good.name: 0.2})
    assert taken("best") == (best, "taking step1.ckpt, the best by val/loss (0.1)\n")
    assert taken("best", SaveCheckpoints(str(tmp_path), monitor="val/loss", mode="max"))[0] == good
    assert taken("best", SaveCheckpoints(str(tmp_path))) == (newest, "taking step3.ckpt, the newest\n")
    assert taken("last") == (newest, "taking step3.ckpt, the newest\n")
    assert taken(str(good)) == (good, "")
    (best / STATE).unlink()
    path, said = taken("best")
    assert path == good
    assert said.startswith(f"{best}, whose val/loss is better, is missing or damaged; passing over it\n")


def test_fast_dev_run(quick: list[str], tmp_path: Path) -> None:
    fit.main([*quick, "--trainer.fast_dev_run=true"])
    assert not list(tmp_path.rglob("*.ckpt"))


# ---------------------------------------------------------------- what to continue from


def save(folder: Path, step: int, content: bytes = b"weights") -> Path:
    path = folder / f"step{step}.ckpt"
    staged = stage(path)
    (staged / STATE).write_bytes(content)
    seal(staged, path, digest(staged), {"step": step, "kind": "file", "world_size": 1})
    return path


def continues(run: Path, ckpt_path: str | Path) -> tuple[str | None, str, str]:
    """What a run would continue from, and what it says on stdout and stderr."""
    cli = TrainingCLI([*TINY, f"--run_dir={run}", f"--ckpt_path={ckpt_path}"])
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        chosen = cli.checkpoint()
    return chosen, out.getvalue(), err.getvalue()


def refuses(run: Path, *options: str) -> str:
    """The one line with which a run is refused."""
    _, code = ends(fit.main, [*TINY, f"--run_dir={run}", *options])
    assert isinstance(code, str)  # an exit code of 1, and this on stderr
    assert code.startswith("error: ")
    assert "\n" not in code
    return code


def test_last_of_nothing_is_the_beginning(tmp_path: Path) -> None:
    said = f"no checkpoint in {tmp_path / 'checkpoints'} yet: starting from the beginning\n"
    assert continues(tmp_path, "last") == (None, said, "")
    stage(tmp_path / "checkpoints" / "step1.ckpt")
    chosen, out, err = continues(tmp_path, "last")
    assert (chosen, out) == (None, said)
    assert err.count("warning: ") == 1
    assert ".step1.ckpt.partial" in err


def test_last_passes_over_what_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints"
    earlier, later = save(folder, 9), save(folder, 10)
    assert continues(tmp_path, "last") == (str(later), f"continuing from {later}\n", "")
    (later / STATE).write_bytes(b"w_ights")
    chosen, out, err = continues(tmp_path, "last")
    assert chosen == str(earlier)
    assert out == f"continuing from {earlier}\n"
    assert err == f"warning: {later} is damaged: {STATE}: content changed; using step9.ckpt instead\n"
    monkeypatch.setenv("RANK", "1")  # compares sizes, says nothing, and loads what rank 0 has chosen
    assert continues(tmp_path, "last") == (str(later), "", "")


def test_last_never_begins_anew_where_all_is_damaged(tmp_path: Path) -> None:
    (save(tmp_path / "checkpoints", 1) / STATE).unlink()
    said = refuses(tmp_path, "--ckpt_path=last")
    assert f"{STATE}: missing" in said
    assert "--run_dir" in said
    (tmp_path / "old" / "checkpoints").mkdir(parents=True)
    (tmp_path / "old" / "checkpoints" / "last.ckpt").write_bytes(b"PK")
    assert "last.ckpt is a single file" in refuses(tmp_path / "old", "--ckpt_path=last")


def test_a_damaged_path_is_refused_with_an_alternative(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    whole, damaged = save(folder, 1), save(folder, 2)
    (damaged / STATE).write_bytes(b"w_ights")
    said = refuses(tmp_path, f"--ckpt_path={damaged}")
    assert f"{damaged} is damaged: {STATE}: content changed" in said
    assert f"the newest whole one there is {whole}" in said
    (whole / STATE).unlink()
    assert f"there is no whole one in {folder}" in refuses(tmp_path, f"--ckpt_path={damaged}")


def test_a_path_continues_unless_later_steps_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    one, two = save(folder, 1), save(folder, 2)
    assert continues(tmp_path, two)[0] == str(two)
    assert continues(tmp_path / "branch", one)[0] == str(one)
    said = refuses(tmp_path, f"--ckpt_path={one}")
    assert "step2.ckpt" in said
    assert "--run_dir" in said


def test_a_checkpoint_error_in_training_is_one_line(quick: list[str], tmp_path: Path) -> None:
    options = [*quick, "--trainer.val_check_interval=1", "--checkpoint.monitor=val/relyability"]
    message, code = ends(fit.main, options)
    assert isinstance(code, str)
    assert code.startswith("error: checkpoint.monitor is 'val/relyability'")
    assert "val/reliability/token_accuracy" in code
    assert "Traceback" not in message


def test_a_missing_file_of_records_is_named_before_anything_is_built(quick: list[str], tmp_path: Path) -> None:
    sources = f"[{{format: counterfact, path: {tmp_path / 'nowhere.json'}}}]"
    message, code = ends(fit.main, [*quick, f"--data.init_args.val={sources}"])
    assert code.startswith("error: no file")
    assert "nowhere.json" in code
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


def test_a_malformed_record_is_one_line(quick: list[str], tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_text('[{"case_id": 0, "prompt": "A city is in"}]', encoding="utf-8")
    sources = f"[{{format: counterfact, path: {file}, options: {{}}}}]"
    message, code = ends(fit.main, [*quick, f"--data.init_args.train={sources}"])
    assert code.startswith(f"error: {file}, record")
    assert "Traceback" not in message


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data.init_args.train=[{format: facts, limit: 3}]"], "3 records do not fill one optimizer step of 16"),
        (["--trainer.limit_train_batches=3", "--trainer.accumulate_grad_batches=2"], "Trainer(limit_train_batches=3)"),
        (["--model.init_args.backbone.source=random:bert"], "backbone 'random:bert': choose a type among"),
    ],
)
def test_what_training_refuses_is_one_line(quick: list[str], options: list[str], said: str) -> None:
    _, code = ends(fit.main, [*quick, *options])
    assert code.startswith(f"error: {said}")
    assert "\n" not in code


def test_a_fault_keeps_its_traceback(quick: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        return int("none")

    monkeypatch.setattr("modules.trained.InComeS.training_step", broken)
    with pytest.raises(ValueError, match="invalid literal"):
        fit.main(quick)


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK", "SLURM_PROCID"])
def test_errors_are_said_by_rank_0_alone(variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "checkpoints", 1)
    wrong = [["--model.init_args.loss.kl_wieght=1"], ["--data.init_args.records_per_batch=0"], []]
    for rank in ("0", "1"):
        monkeypatch.setenv(variable, rank)
        for options in wrong:
            message, code = ends(fit.main, [*TINY, f"--run_dir={tmp_path}", *options])
            assert code not in (0, None)
            assert bool(message) == (rank == "0")
            assert rank == "0" or code == 1


def test_checkpoints_without_manifests_are_refused(tmp_path: Path) -> None:
    plugin = "--trainer.plugins=[{class_path: lightning.pytorch.plugins.io.AsyncCheckpointIO}]"
    message, _ = ends(parse, [*TINY, plugin])
    assert "trainer.plugins has AsyncCheckpointIO" in message
    ours = parse([*TINY, "--trainer.plugins=[{class_path: trainers.checkpoints.single.FolderIO}]"])
    others = parse(
        [*TINY, "--trainer.plugins=[{class_path: lightning.pytorch.plugins.environments.LightningEnvironment}]"]
    )
    for cli in (ours, others):
        assert type(cli.trainer.strategy.checkpoint_io) is FolderIO
