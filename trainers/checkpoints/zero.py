"""A ZeRO checkpoint: DeepSpeed's own files, one or two of each rank, in a folder that is sealed when all are there."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from trainers.checkpoints.folder import (
    CheckpointError,
    digest,
    failed,
    partial,
    read_manifest,
    remove,
    seal,
    stage,
    sync,
)

TAG = "checkpoint"  # DeepSpeed's name of the folder in the folder

# what DeepSpeed pickles beside tensors: all that loading may build
torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])


class ShardFiles(TorchCheckpointEngine):
    """Writes and reads one file of DeepSpeed's. Loading runs no code that a file brings. A failed write is remembered
    rather than raised: DeepSpeed's ranks wait for each other while they save, so that one that left would hang them."""

    def __init__(self) -> None:
        super().__init__(None)
        self.target = Path()  # the checkpoint
        self.written: list[Path] = []
        self.failure: str | None = None

    def begin(self, target: Path) -> None:
        self.target, self.written, self.failure = target, [], None

    def save(self, state_dict: Any, path: str) -> None:
        try:
            torch.save(state_dict, path)
            sync(Path(path))  # from the machine that wrote it: no other can
            self.written.append(Path(path))
        except (OSError, RuntimeError) as error:  # torch's own writer raises the latter on a full disk
            self.failure = self.failure or str(failed(self.target, error))

    def load(self, path: str, map_location: Any = None) -> Any:
        return torch.load(path, map_location=map_location, weights_only=True)


def save(engine: Any, path: Path, client_state: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Save an engine's state as the folder `path`, on all ranks together.

    Args:
        engine: DeepSpeed's; its `checkpoint_engine` is a `ShardFiles`.
        path: the same on every rank.
        client_state: plain values that are to come back with it.
        facts: for the manifest.

    Raises:
        CheckpointError: on all ranks, if any could not write; what was there before is as it was.
    """
    engine.checkpoint_engine.begin(path)
    engine._copy_recovery_script = lambda _: None  # a script that loads pickles as code; trainers.export serves instead
    try:
        _write(engine, path, dict(client_state), dict(facts))
    except CheckpointError:
        if dist.get_rank() == 0:
            remove(partial(path))
        raise


def _write(engine: Any, path: Path, client_state: dict[str, Any], facts: dict[str, Any]) -> None:
    files: ShardFiles = engine.checkpoint_engine
    rank, staged = dist.get_rank(), partial(path)
    if rank == 0:
        try:
            (stage(path) / TAG).mkdir()
            (staged / "latest").write_text(TAG, encoding="utf-8")
            files.written.append(staged / "latest")
        except OSError as error:
            files.failure = str(failed(path, error))
    agree(files.failure, f"{path.name} is not saved")
    client_state["param_groups"] = hyperparameters(engine.optimizer)
    engine.save_checkpoint(
        str(staged), tag=TAG, client_state=client_state, save_latest=False, exclude_frozen_parameters=True
    )
    agree(files.failure, f"{path.name} is not saved")
    own, failure = {}, None
    try:
        own = digest(staged, [file.relative_to(staged).as_posix() for file in files.written])
    except CheckpointError as error:
        failure = str(error)
    agree(failure, f"{path.name} is not saved")
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    if rank == 0:
        try:
            seal(staged, path, {name: of_file for part in found for name, of_file in part.items()}, facts)
        except CheckpointError as error:
            failure = str(error)
    agree(failure, f"{path.name} is not saved")


def agree(failure: str | None, what: str) -> None:
    """Raise on all ranks where one has failed.

    Raises:
        CheckpointError: naming the ranks and what they met.
    """
    every: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(every, failure)
    met = [f"rank {rank}: {text}" for rank, text in enumerate(every) if text]
    if met:
        raise CheckpointError(f"{what}: {'; '.join(met[:3])}")


def load(engine: Any, path: Path, stage: int, optimizer_states: bool, wait: Callable[[], Any]) -> dict[str, Any]:
    """Load into an engine what `save` wrote, on all ranks together, and give the client state back.

    Another number of ranks, or another stage, goes through DeepSpeed's universal checkpoint: a copy in which every
    parameter has a file of its own, made for the purpose and deleted after it.

    Args:
        stage: of the engine.
        optimizer_states: load these too; otherwise weights alone.
        wait: a barrier that waits as long as it takes.

    Raises:
        CheckpointError: on all ranks, where the folder is no ZeRO checkpoint, or does not fit the engine's parameters.
    """
    manifest = read_manifest(path)
    if manifest["kind"] != "zero":
        raise CheckpointError(
            f"{path} was not written under ZeRO: go on without (trainer.strategy: auto, or ddp), or begin another run "
            "from an export of it"
        )
    check_parameters(path, manifest["parameters"], parameters(engine.module))
    then, now = ((manifest["world_size"], manifest["stage"]), (dist.get_world_size(), stage))
    if then == now:
        _, client_state = engine.load_checkpoint(
            str(path),
            tag=TAG,
            load_module_strict=False,
            load_optimizer_states=optimizer_states,
            load_lr_scheduler_states=False,
        )
        return client_state
    folder = path.parent / f".{path.name}.universal"
    failure = None
    if dist.get_rank() == 0:
        print(f"{path.name} is of {then[0]} ranks at stage {then[1]}, this run of {now[0]} at {now[1]}: converting")
        failure = convert(path, folder, stage)
    wait()
    agree(failure, f"{path} could not be converted to this number of ranks")
    engine._config.load_universal_checkpoint = True
    try:
        _, client_state = engine.load_checkpoint(
            str(folder), tag=TAG, load_module_strict=False, load_lr_scheduler_states=False
        )
    finally:
        engine._config.load_universal_checkpoint = False
    for group, saved in zip(engine.optimizer.param_groups, client_state["param_groups"], strict=True):
        group.update(saved)  # stage 3 would give all groups the rates of the first
    for state in engine.optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()  # one tensor for all would count each step once for every group
    wait()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return client_state


def tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The trained parameters of a checkpoint, in float32, and its buffers, by name: one at a time from files that are
    mapped into memory, so that at most one set of weights is held, and no optimizer states."""
    found: Any = get_fp32_state_dict_from_zero_checkpoint(str(path), TAG, True, lazy_mode=True)
    for name in list(found):
        yield name, found.pop(name).contiguous()


def convert(path: Path, folder: Path, stage: int) -> str | None:
    """Write the universal form of a checkpoint, in a process of its own; what went wrong, if anything did."""
    shutil.rmtree(folder, ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-m", "trainers.checkpoints.universal", str(path), str(folder), str(stage)],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if done.returncode == 0 else f"{done.stdout[-500:]}{done.stderr[-1500:]}"


def hyperparameters(optimizer: Any) -> list[dict[str, Any]]:
    """Of each parameter group all but its parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def parameters(module: nn.Module) -> dict[str, list[int]]:
    """Shapes of the trained parameters by name, whether in shards or whole."""
    return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in module.named_parameters() if p.requires_grad}


def check_parameters(path: Path, saved: Mapping[str, list[int]], now: Mapping[str, list[int]]) -> None:
    """Refuse a checkpoint of other parameters.

    Raises:
        CheckpointError: naming some that differ.
    """
    missing, unknown = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    reshaped = [f"{n} {saved[n]} -> {now[n]}" for n in sorted(now.keys() & saved.keys()) if saved[n] != now[n]]
    if missing or unknown or reshaped:
        raise CheckpointError(
            f"{path} does not fit this configuration: {len(missing)} trained parameters are missing "
            f"({', '.join(missing[:3])}), {len(unknown)} are unknown ({', '.join(unknown[:3])}), {len(reshaped)} have "
            f"another shape ({', '.join(reshaped[:3])}). Use the config.yaml of the run that wrote it."
        )
