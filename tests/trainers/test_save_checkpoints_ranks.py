"""Two ranks whose scores and readings differ save, keep and go on from the same checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, free_port

from trainers.checkpoints.folder import verify

RANKS = """
import json, sys
from pathlib import Path
sys.path[:0] = {paths!r}
import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset
from scored_runs import Scored
from trainers.callbacks.save_checkpoints import SaveCheckpoints
from trainers.checkpoints.single import FolderIO
from trainers.processes import end_group
folder = Path({folder!r})
loader = DataLoader(TensorDataset(torch.arange(100.0)[:, None]))

def train(steps, scores, resume=None):
    saves = SaveCheckpoints(str(folder), every_n_steps=2, monitor="val/score")
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", plugins=[FolderIO()], callbacks=[saves], logger=False,
        max_steps=steps, val_check_interval=1, check_val_every_n_epoch=None, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, default_root_dir=folder)
    trainer.fit(Scored(scores), loader, DataLoader(TensorDataset(torch.zeros(2, 1))), ckpt_path=resume)
    return trainer, saves

# each rank has scores of its own, which alone would part the ranks' ways
rank = int({rank})
_, first = train(4, {{1: 0.5, 2: 0.1, 3: 0.9, 4: 0.2}} if rank == 0 else {{1: 0.1, 2: 0.9, 3: 0.0, 4: 0.9}})
# rank 0 alone knows that the newest one is damaged; rank 1 would take it
second, saves = train(5, {{}}, folder / ("step3.ckpt" if rank == 0 else "step4.ckpt"))
print(json.dumps([first.names, first.scores, saves.names, second.global_step, second.fit_loop.total_batch_idx]))
end_group()
"""


def test_two_ranks_decide_alike(tmp_path: Path) -> None:
    place = {"paths": [str(ROOT), str(ROOT / "tests")], "folder": str(tmp_path)}
    job = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS.format(rank=rank, **place)],
            env=os.environ | job | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ends = [process.communicate(timeout=100) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], ends[0][1] + ends[1][1]
    said = [json.loads(out.splitlines()[-1]) for out, _ in ends]
    assert said[0] == said[1]
    names, scores, later, step, batches = said[0]
    assert names == ["step3.ckpt", "step4.ckpt"]
    assert scores == {"step3.ckpt": pytest.approx(0.9), "step4.ckpt": pytest.approx(0.2)}
    assert later == ["step3.ckpt", "step5.ckpt"]
    assert (step, batches) == (5, 4)  # from step 3 on: Lightning counts the batches of both parts
    assert sorted(path.name for path in tmp_path.glob("step*.ckpt")) == ["step3.ckpt", "step5.ckpt"]
    assert verify(tmp_path / "step3.ckpt")["world_size"] == 2
