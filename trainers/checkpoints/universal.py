"""DeepSpeed's universal checkpoint: `python -m trainers.checkpoints.universal STEP.ckpt FOLDER STAGE`.

A module of its own because it is run as a process of its own: it starts workers, and its memory goes with it.
DeepSpeed converts to another number of ranks at the same stage; stages 1 and 2 read another form than stage 3, and what
is missing between the two is added here.
"""

import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint import ds_to_universal

from trainers.checkpoints.folder import read_manifest
from trainers.checkpoints.zero import TAG

WORKERS = 4  # processes that read shards side by side


def main(source: Path, folder: Path, stage: int) -> None:
    """Write the universal form of the ZeRO checkpoint `source` into `folder`, to be loaded by an engine at `stage`."""
    target = folder / TAG
    target.mkdir(parents=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(source / TAG),
            output_folder=str(target),
            num_extract_workers=WORKERS,
            num_merge_workers=WORKERS // 2,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    manifest = read_manifest(source)
    if manifest["stage"] < 3 and stage == 3:
        to_stage_3(target)
    elif manifest["stage"] == 3 and stage < 3:
        from_stage_3(target, manifest["parameters"])


def to_stage_3(target: Path) -> None:
    """Stage 3 looks for the common states under another name, and for hyperparameters a level deeper."""
    file = target / "zero" / "optimizer_state.pt"
    state: dict[str, Any] = torch.load(file)
    step = torch.load(next((target / "zero").glob("*/step.pt")))
    state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": state["param_groups"]}
    torch.save(state, file)
    os.link(target / "mp_rank_00_model_states.pt", target / "zero_pp_rank_0_mp_rank_00_model_states.pt")


def from_stage_3(target: Path, shapes: dict[str, list[int]]) -> None:
    """Stages 1 and 2 want each tensor in its shape, the step beside it, and to know DeepSpeed's version."""
    file = target / "zero" / "optimizer_state.pt"
    state: dict[str, Any] = torch.load(file)
    step = state["optimizer_state_dict"]["state"][0]["step"]
    torch.save(state | {"ds_version": deepspeed.__version__}, file)
    for name, shape in shapes.items():
        folder = target / "zero" / name
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            flat = torch.load(folder / f"{kind}.pt")
            torch.save({"cat_dim": 0, "param": flat.detach().view(shape)}, folder / f"{kind}.pt")
        torch.save(step, folder / "step.pt")
    os.link(target / "zero_pp_rank_0_mp_rank_00_model_states.pt", target / "mp_rank_00_model_states.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
