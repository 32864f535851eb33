"""Throughput, gradient norms and pool sizes, as they are logged."""

from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from callback_runs import STEPS, fit, scalars

from datamodules.schedule import pool_sizes as schedule_sizes
from trainers.callbacks import throughput
from trainers.callbacks.grad_norm import GradNorm
from trainers.callbacks.pool_sizes import PoolSizes, pool_sizes
from trainers.callbacks.throughput import Throughput, count


def test_throughput_is_logged(run):
    for name in ("tokens_per_second", "queries_per_second", "padding_share", "memory_gib"):
        assert len(scalars(run.events, f"train/{name}")) == STEPS
    tokens, queries = (scalars(run.events, f"train/{n}_per_second") for n in ("tokens", "queries"))
    assert all(t > 20 * q > 0 for t, q in zip(tokens, queries, strict=True))  # a query and its edit: 20 bytes and more
    assert all(0 < share < 1 for share in scalars(run.events, "train/padding_share"))
    assert all(0.05 < gib < 100 for gib in scalars(run.events, "train/memory_gib"))


class Batch:
    """2 queries of 3 and 5 tokens, one edit of 4; the teacher's rows hold 9 and 10."""

    queries_mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def __init__(self) -> None:
        self.queries_mask = Batch.queries_mask
        self.edits_mask = torch.ones(1, 4)
        self.teacher_blocks = torch.tensor([[1] * 4 + [2] * 5 + [0], [2] * 10])

    def __len__(self) -> int:
        return 2


def test_count_of_a_batch():
    assert count(Batch()).tolist() == [12, 2, 3, 34]
    with pytest.raises(ValueError, match="_mask"):
        count(SimpleNamespace(queries=torch.ones(1)))


def test_throughput_counts_loading_but_neither_validation_nor_checkpoints(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=2, strategy=SimpleNamespace(reduce=lambda t, reduce_op: 2 * t)
    )
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log_dict=logged.update, log=lambda k, v, **_: logged.update({k: v})
    )
    callback = Throughput(window=2)
    callback.on_train_start(trainer, module)

    def step(loading: float, training: float, micro_batches: int = 2) -> None:
        for i in range(micro_batches):
            clock.now += loading
            callback.on_train_batch_start(trainer, module, Batch(), i)
            clock.now += training
            trainer.global_step += i == micro_batches - 1
            callback.on_train_batch_end(trainer, module, None, Batch(), i)

    step(1, 3)
    assert "train/tokens_per_second" not in logged  # no full window yet
    assert logged["train/padding_share"] == pytest.approx(3 / 34)
    callback.on_validation_start(trainer, module)
    clock.now += 1000
    step(0, 2)  # what stands between a validation's end and the next batch is not counted
    rate = 2 * 2 * 2 * 12 / (2 * 4 + 2 * 2)  # ranks x steps x micro-batches x tokens
    assert logged["train/tokens_per_second"] == pytest.approx(rate)
    assert logged["train/queries_per_second"] == pytest.approx(rate / 6)
    callback.on_save_checkpoint(trainer, module, {})
    clock.now += 1000
    step(0, 1)
    assert logged["train/tokens_per_second"] == pytest.approx(2 * 2 * 2 * 12 / (2 * 2 + 2 * 1))  # the first has left
    assert logged["train/memory_gib"] > 0


def test_gradient_norm_is_that_before_clipping(run, tmp_path, cache):
    norms = scalars(run.events, "train/grad_norm")
    seen = Seen()
    clipped = fit(tmp_path, cache, [GradNorm(), seen], run.selection, gradient_clip_val=1e-3)
    assert scalars(clipped.events, "train/grad_norm")[0] == pytest.approx(norms[0], rel=1e-5)
    assert seen.norm == pytest.approx(1e-3, rel=1e-3)
    assert norms[0] > 1e-2


class Seen(L.Callback):
    """The norm of the gradients that the optimizer used."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.norm = float(torch.stack([p.grad.norm() for p in pl_module.parameters() if p.grad is not None]).norm())


def test_gradient_norm_is_the_engines_where_there_is_one():
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(log=lambda name, value: logged.update({name: value}))
    trainer: Any = SimpleNamespace(model=SimpleNamespace(get_global_grad_norm=lambda: 4.0), global_step=0)
    callback = GradNorm()
    callback.on_before_optimizer_step(trainer, module, None)  # type: ignore[arg-type]
    callback.on_train_batch_end(trainer, module, None, None, 0)
    assert not logged  # within an accumulation
    trainer.global_step = 1
    callback.on_train_batch_end(trainer, module, None, None, 1)
    assert logged == {"train/grad_norm": 4.0}


def test_pool_sizes_are_counted_once_a_pool():
    visible = torch.block_diag(torch.ones(3, 2), torch.ones(1, 1), torch.ones(2, 4)).bool()
    assert sorted(pool_sizes(visible).tolist()) == [1, 2, 4]


def test_pool_sizes_are_logged(tmp_path, cache):
    watched = fit(tmp_path, cache, [PoolSizes()], accumulate_grad_batches=2, log_every_n_steps=2, val_check_interval=4)
    (event,) = watched.events.Histograms("train/pool_size")
    schedule = [pools(watched, step) for step in (0, 0, 1, 1)]  # two steps of two micro-batches
    drawn = [size for sizes in schedule for size in sizes]
    assert event.step == 2
    assert event.histogram_value.num == len(drawn)
    assert event.histogram_value.sum == sum(drawn) == 24
    assert scalars(watched.events, "train/pool_size_mean") == [pytest.approx(24 / len(drawn))]


def pools(run, step: int) -> list[int]:
    module = run.trainer.datamodule
    return schedule_sizes(module.seed, 0, step, 6, module.pool_sizes, module.pool_rates)
