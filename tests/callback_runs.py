"""Runs of a tiny random model with callbacks, and what they logged."""

import random
from types import SimpleNamespace

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from datamodules.edits import EditDataModule
from datamodules.sources import Source
from modules.backbone import BackboneConfig
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions
from trainers.callbacks.final_evaluation import FinalEvaluation
from trainers.callbacks.grad_norm import GradNorm
from trainers.callbacks.pool_sizes import PoolSizes
from trainers.callbacks.sample_edits import SampleEdits
from trainers.callbacks.selection_figures import SelectionFigures
from trainers.callbacks.throughput import Throughput

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
STEPS = 2


def data(cache) -> EditDataModule:
    return EditDataModule(
        train=[Source("facts", options={"split": "train"}, limit=40)],
        val=[Source("facts", options={"split": "val"}, limit=8)],
        test=[Source("facts", options={"split": "test"}, limit=8)],
        records_per_batch=6,
        pool_sizes=[2, 4],
        pool_rates=[0.5, 0.5],
        val_pool=4,
        val_records=4,
        cache_dir=str(cache),
    )


def fit(folder, cache, callbacks, selection="qk", **options):
    """A run of two optimizer steps, with a validation after each; the module and the values that it logged."""
    L.seed_everything(3)
    torch.set_num_threads(1)
    train, checkpoint = options.pop("train", "full"), options.pop("ckpt_path", None)
    module = InComeS(
        BackboneConfig("random:llama", overrides=TINY),
        GistConfig(selection=selection),
        train=train,
        lora=LoraOptions(rank=2),
    )
    settings = {"max_steps": STEPS, "val_check_interval": 1, "log_every_n_steps": 1} | options
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=TensorBoardLogger(str(folder), name="", version="", default_hp_metric=False),
        default_root_dir=str(folder),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        use_distributed_sampler=False,
        **settings,
    )
    trainer.fit(module, data(cache), ckpt_path=checkpoint and str(folder / checkpoint))
    generators = torch.get_rng_state(), random.getstate()
    sizes = dict.fromkeys(("images", "scalars", "tensors", "histograms"), 0)  # 0: keep all
    events = EventAccumulator(str(folder), sizes).Reload()
    return SimpleNamespace(module=module, trainer=trainer, events=events, folder=folder, generators=generators)


def scalars(events, tag):
    return [e.value for e in events.Scalars(tag)]


def everything():
    return [
        Throughput(window=1),
        GradNorm(),
        PoolSizes(),
        SelectionFigures(records=4, examples=2),
        SampleEdits(count=2, max_new_tokens=3),
        FinalEvaluation([1, 4], records=4, pool_1_records=2),
    ]
