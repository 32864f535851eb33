"""Runs of the tiny config as real processes that form one job: `python ranks.py SPEC.json` is one rank of it.

A test writes what is to be run, `together` starts the ranks, and rank 0 leaves what it saw in a file for each run.
"""

import errno
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LIMIT = 480  # seconds for each run of a job; the first one may compile an operator, and others may want the cores
sys.path.insert(0, str(ROOT))

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.val_check_interval=1000",
    "--checkpoint.at_end=false",
]
# what each config needs besides
CONFIGS = {
    "incomes_tiny": ["--model.init_args.optimizer.decay_steps=20"],
    "mend_tiny": ["--trainer.callbacks=[]"],
    "ibke_tiny": ["--trainer.callbacks=[]"],
    "serac_tiny": ["--trainer.callbacks=[]"],
    "distillmike_tiny": [
        "--model.init_args.teacher=told.RightEdit",  # for MIKE, which loads a sentence encoder
        '--model.init_args.start={"class_path": "modules.training_free.LoRA", "init_args": {"steps": 2, "lr": 0.05}}',
        "--data.init_args.pool_rates=[1, 1, 1]",
    ],
}
# the same 16 records in the same pools for each step: 8 of a micro-batch, on two ranks or in two accumulated ones
TWO = ["--trainer.devices=2"]
ONE = ["--trainer.devices=1", "--trainer.accumulate_grad_batches=2"]
HALVES = ["--data.init_args.records_per_batch=8", "--data.init_args.pool_sizes=[2, 4, 8]"]


def zero(stage: int, *more: str) -> list[str]:
    """The arguments of ZeRO at a stage."""
    settings = {"stage": stage, "timeout": 60, "persistence_threshold": 100}
    given = [f"--trainer.strategy.init_args.{key}={value}" for key, value in settings.items()]
    return ["--trainer.strategy=trainers.strategies.Zero", *given, *more]


def environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What tells a process its place in the job."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
    return os.environ | {key: str(value) for key, value in place.items()} | own


def free_port() -> int:
    """A port where nothing listens, out of this test process's own thousand.

    They lie below those that the kernel hands to whoever asks for any: such a one may be another test's connection by
    the time the ranks meet.
    """
    first = 20_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(first, first + 1_000), 100):
        with socket.socket() as found:
            try:
                found.bind(("", port))
            except OSError:
                continue
            return port
    raise OSError(errno.EADDRINUSE, f"a hundred ports between {first} and {first + 1_000} are taken")


def start(folder: Path, runs: Sequence[Mapping[str, Any]], ranks: int = 2) -> list[subprocess.Popen[str]]:
    """Start the ranks of one job, which does the runs one after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = folder / "spec.json"
    spec.write_text(json.dumps({"folder": str(folder), "runs": list(runs)}), encoding="utf-8")
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, __file__, str(spec)],
            env=environment(rank, ranks, port),
            stdout=(folder / f"out{rank}.txt").open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]


def together(folder: Path, runs: Sequence[Mapping[str, Any]], ranks: int = 2) -> dict[str, dict[str, Any]]:
    """Do the runs as one job of so many ranks: what rank 0 saw of each, by name."""
    import torch

    started = start(folder, runs, ranks)
    codes: list[int | None] = [None] * ranks
    done, since = -1, time.monotonic()
    while None in codes and time.monotonic() < since + LIMIT:
        if (now := sum((folder / f"{run['name']}.pt").is_file() for run in runs)) != done:
            done, since = now, time.monotonic()
        time.sleep(0.05)
        codes = [process.poll() for process in started]
    for process in started:  # who waits for a rank that will not come holds locks that others wait for
        process.kill()
    said = "\n".join((folder / f"out{rank}.txt").read_text()[-3000:] for rank in range(ranks))
    assert codes == [0] * ranks, f"exit codes {codes} (None: its run took more than {LIMIT} s)\n{said}"
    return {run["name"]: torch.load(folder / f"{run['name']}.pt", weights_only=True) for run in runs}


def perform(run: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One run on this rank, in folder / name.

    Keys: name, args, steps; config: its name, by default incomes_tiny; save: whether to save at the end; resume: the
    checkpoint to go on from; usage: whether to note memory, open files and processes after each step; fails: whether it
    is to. What goes wrong in it: nan: [rank, step] where the loss is no number; nan_gradient: where a gradient is;
    full_disk: [rank, step] after which nothing can be written; slow_save: the step whose checkpoint stops half-way.
    """
    import lightning as L
    import torch

    from trainers.cli import TrainingCLI

    class Watch(L.Callback):
        losses: list[float]
        records: list[list[str]]
        usage: list[tuple[int, int, int]]
        answers: list[Any] | None = None

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            self.losses, self.records, self.usage = [], [], []
            if run.get("nan"):
                not_a_number(trainer, module, *run["nan"])
            if run.get("nan_gradient"):
                bad_gradient(trainer, module, *run["nan_gradient"])

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
            self.records.append(batch.records)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            (folder / f"{run['name']}.{trainer.global_rank}.step").write_text(str(trainer.global_step))
            if run.get("usage"):
                self.usage.append(usage())
            if trainer.global_step == run.get("slow_save"):
                slow_save(folder)
            if [trainer.global_rank, trainer.global_step] == run.get("full_disk"):
                full_disk()

        def on_train_end(self, trainer: Any, module: Any) -> None:
            if run.get("save"):
                trainer.checkpoint_callback.save(trainer)
                with gathered():  # after fit the module is on the CPU
                    self.answers = ask(module.editor(), trainer.datamodule)

    config = run.get("config", "incomes_tiny")
    args = [f"--config={config}", *QUIET, *CONFIGS[config], *HALVES, f"--run_dir={folder / run['name']}", *run["args"]]
    cli = TrainingCLI([*args, f"--trainer.max_steps={run['steps']}"])
    watch = Watch()
    trainer, module = cli.trainer, cli.model
    gathered = getattr(trainer.strategy, "gathered", nullcontext)
    trainer.callbacks.insert(0, watch)
    error = None
    try:
        trainer.fit(module, cli.datamodule, ckpt_path=run.get("resume"))
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
        if not run.get("fails"):
            raise
    with gathered():
        params = {n: p.detach().float().cpu().clone() for n, p in module.named_parameters() if p.requires_grad}
        buffers = {n: b.clone().cpu() for n, b in module.named_buffers() if n in module.trained_names()}
    every: list[Any] = [watch.records]
    timeouts: set[float] = set()
    if trainer.world_size > 1:
        groups = torch.distributed.distributed_c10d._world.pg_map
        timeouts = {g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups}
        every = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, watch.records)
    seen = {"losses": watch.losses, "params": params, "buffers": buffers, "records": every, "error": error}
    return seen | {"answers": watch.answers, "usage": watch.usage, "timeouts": sorted(timeouts)}


def not_a_number(trainer: Any, module: Any, rank: int, step: int | None) -> None:
    plain = module.losses

    def losses(batch: Any, visible: Any) -> dict[str, Any]:
        found = plain(batch, visible)
        if trainer.global_rank == rank and step in (None, trainer.global_step):
            found["loss"] = found["loss"] * float("nan")
        return found

    module.losses = losses


def bad_gradient(trainer: Any, module: Any, rank: int, step: int) -> None:
    """The gradient of one state, half-way through the model, is no number; the loss is one."""

    def hook(_: Any, __: Any, output: Any) -> None:
        if module.training and output.requires_grad and (trainer.global_rank, trainer.global_step) == (rank, step):
            output.register_hook(lambda gradient: gradient * float("nan"))

    module.gists.backbone.layers[1].get_submodule("mlp").register_forward_hook(hook)


def slow_save(folder: Path) -> None:
    """From now on a file that is saved is followed by a long wait."""
    import torch

    plain = torch.save

    def save(state: Any, path: Any, *args: Any, **options: Any) -> None:
        plain(state, path, *args, **options)
        (folder / "saving").touch()
        time.sleep(300)

    torch.save = save


def full_disk() -> None:
    import torch

    def save(state: Any, path: Any, *args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.save = save


def usage() -> tuple[int, int, int]:
    """Resident bytes, open files and child processes of this process."""
    import psutil

    process = psutil.Process()
    return process.memory_info().rss, process.num_fds(), len(process.children(recursive=True))


def ask(editor: Any, datamodule: Any) -> list[Any]:
    """Log-probabilities [tokens] of some validation answers, with the edits in place."""
    import torch

    records = datamodule.validation_records()[:4]
    asked = [q for r in records for q in r.rephrases]
    with torch.no_grad(), editor.edit(editor.model.backbone, [r.request for r in records]) as edited:
        return [a.log_probs for a in edited.score([q.prompt for q in asked], [q.target for q in asked])]


def main(spec: Path) -> None:
    import torch

    from trainers.processes import end_group

    given = json.loads(spec.read_text(encoding="utf-8"))
    folder = Path(given["folder"])
    for run in given["runs"]:
        seen = perform(run, folder)
        if os.environ["RANK"] == "0":
            torch.save(seen, folder / f"{run['name']}.pt")
    end_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
