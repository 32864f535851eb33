"""The scripts of launch/: torchrun for real, SLURM with stand-ins for its commands, the container file read."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.trainers.signalling import DDP, ROOT, RUN, run, signal_at
from trainers.checkpoints.folder import whole

LAUNCH = ROOT / "launch"


@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")))
def test_scripts_parse(script: str) -> None:
    checked = run("bash", "-n", LAUNCH / script)
    assert (checked.returncode, checked.stderr) == (0, "")


# ------------------------------------------------------------------------------------------------------- torchrun


def test_torchrun_passes_a_signal_on_and_tells_of_the_checkpoint(tmp_path: Path) -> None:
    """Two ranks. The signal comes to torchrun, as from whoever stops a job."""
    command = ["bash", LAUNCH / "torchrun.sh", *RUN, DDP[1], f"--run_dir={tmp_path}", "--trainer.max_steps=200"]
    ended = run(*command, *signal_at(1, parent="true"), GPUS_PER_NODE="2")
    assert ended.returncode == 143, ended.stderr
    assert "Starting with 2 processes" in ended.stderr
    (saved,) = whole(tmp_path / "checkpoints")
    assert 2 <= int(saved.stem.removeprefix("step")) < 200  # torchrun passes it on when it next looks, some steps later


def test_torchrun_ends_with_1_after_an_error() -> None:
    failed = run("bash", LAUNCH / "torchrun.sh", "--config=nothing", GPUS_PER_NODE="1")
    assert failed.returncode == 1
    assert "no config 'nothing'" in failed.stderr


def test_torchrun_on_several_machines_needs_the_address_of_the_first() -> None:
    refused = run("bash", LAUNCH / "torchrun.sh", NNODES="2", NODE_RANK="1", GPUS_PER_NODE="8")
    assert refused.returncode != 0
    assert "MASTER_ADDR: set it to the name or address of the machine with NODE_RANK 0" in refused.stderr


# ---------------------------------------------------------------------------------------------------------- SLURM


def slurm(folder: Path, srun: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """slurm.sbatch with a stand-in for srun, and what it has asked scontrol for."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    asked = folder / "scontrol.log"
    for name, body in {"srun": srun, "scontrol": f'echo "$@" >> {asked}'}.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n", encoding="utf-8")
        (commands / name).chmod(0o755)
    job = {"JOB_ID": "1234", "JOB_NAME": "palimpsest", "NNODES": "1", "NTASKS_PER_NODE": "1", "CPUS_PER_TASK": "4"}
    task = {"NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}
    variables = {f"SLURM_{name}": value for name, value in {**job, **task, "SUBMIT_DIR": str(ROOT)}.items()}
    ended = run(
        "env", f"PATH={commands}:{os.environ['PATH']}", "bash", LAUNCH / "slurm.sbatch", *arguments, **variables
    )
    return ended, asked.read_text() if asked.exists() else ""


def test_slurm_queues_a_preempted_job_again_and_it_goes_on(tmp_path: Path) -> None:
    step = 'while [ "$1" != python ]; do shift; done; exec "$@"'
    arguments = [*RUN, f"--run_dir={tmp_path / 'run'}", "--trainer.max_steps=3"]
    first, asked = slurm(tmp_path, step, *arguments, *signal_at(1, name="SIGUSR1"))
    assert first.returncode == 143, first.stderr
    assert asked == "requeue 1234\n"
    assert "no checkpoint in" in first.stdout
    assert "SIGUSR1: saved" in first.stdout
    second, asked = slurm(tmp_path, step, *arguments)
    assert second.returncode == 0, second.stderr
    assert asked == "requeue 1234\n"  # no second time
    assert "continuing from" in second.stdout
    assert [path.name for path in whole(tmp_path / "run" / "checkpoints")] == ["step3.ckpt"]


@pytest.mark.parametrize(
    ("srun", "code"), [("exit 1", 1), ("exit 7", 7), ("kill -USR1 $$", 138), ("kill -KILL $$", 137)]
)
def test_slurm_passes_on_what_else_a_job_ends_with(srun: str, code: int, tmp_path: Path) -> None:
    ended, asked = slurm(tmp_path, srun)
    assert (ended.returncode, asked) == (code, "")


def test_slurm_gives_the_job_s_shape_and_the_arguments_as_they_are(tmp_path: Path) -> None:
    ended, _ = slurm(tmp_path, 'printf "%s\\n" "$@"', "--config=one two", "--x", '{"y": 1}')
    after = ended.stdout.split("trainers.fit\n")[1].splitlines()
    assert after == [
        *("--config=one two", "--x", '{"y": 1}', "--ckpt_path", "last"),
        *("--trainer.num_nodes", "1", "--trainer.devices", "1"),
    ]


# ------------------------------------------------------------------------------------------------------ container


def test_image_holds_what_is_installed() -> None:
    """.dockerignore lets through all that pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = [name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]]
    needed = {*packages, *project["project"]["license-files"], project["project"]["readme"], "pyproject.toml"}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored
    assert needed == {line[1:] for line in ignored if line.startswith("!")}
    assert re.search(r'^ENTRYPOINT \["python", "-m", "trainers.fit"\]$', (LAUNCH / "Containerfile").read_text(), re.M)
