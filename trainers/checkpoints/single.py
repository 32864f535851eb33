"""The checkpoint of one process, or of DDP, whose ranks hold the same: one file in its folder."""

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO

from trainers.checkpoints.folder import CheckpointError, digest, failed, partial, remove, seal, stage, verify

STATE = "state.ckpt"


class FolderIO(CheckpointIO):
    """Saves Lightning's checkpoint as a folder that is whole or does not count (see folder.py).

    Under DDP rank 0 writes while the others wait for it. A failure is then kept in `failure`, for whoever asked for the
    checkpoint to raise on all ranks, rather than raised on rank 0 alone.
    """

    failure: CheckpointError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Save. Called on rank 0 alone.

        Raises:
            CheckpointError: naming the path and the reason, as on a full disk. What was there before is as it was.
                With several ranks it is kept instead.
        """
        self.failure = None
        if storage_options is not None:
            raise TypeError("storage_options are not known here: a checkpoint is a folder of local files")
        path = Path(path)
        facts = {"step": int(checkpoint["global_step"]), "kind": "file", "world_size": _processes()}
        try:
            staged = stage(path)
            torch.save(checkpoint, staged / STATE)
            seal(staged, path, digest(staged), facts)
        except BaseException as error:
            remove(partial(path))
            if isinstance(error, (OSError, RuntimeError)):  # torch's own writer raises the latter on a full disk
                self.failure = failed(path, error)
                if _processes() > 1:
                    return
                raise self.failure from error
            raise

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load, on all ranks what rank 0 was asked for: it alone has read every file before choosing. Tensors come to
        the CPU. A checkpoint is data, and loading it never runs code, whatever `weights_only` says.

        Raises:
            CheckpointError: for one that is damaged, or was written by DeepSpeed.
        """
        path = Path(_of_rank_zero(str(path)))
        about = verify(path, hashes=False)
        if about["kind"] != "file":
            raise CheckpointError(
                f"{path} was written by DeepSpeed ZeRO on {about['world_size']} processes: go on with the same "
                f"strategy, as with --config zero{about.get('stage', 2)}.yaml, or take its weights with trainers.export"
            )
        try:
            return torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path / STATE} cannot be read: {str(error).splitlines()[0]}") from error

    def remove_checkpoint(self, path: str | Path) -> None:
        remove(Path(path))


def tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The trained tensors of a checkpoint, by name."""
    yield from FolderIO().load_checkpoint(path)["state_dict"].items()


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_rank_zero(value: str) -> str:
    if _processes() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
