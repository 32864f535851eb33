"""What a run continues from."""

import io
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from command_ends import TINY, ends, save

from trainers import fit
from trainers.checkpoints.folder import stage
from trainers.checkpoints.single import STATE, FolderIO
from trainers.cli import TrainingCLI, parse


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
