"""The data of a training run: micro-batches of edits for training, pools of records for validation and test."""

import random
import signal
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import lightning as L
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from datamodules.records import EditRecord
from datamodules.schedule import PoolSchedule, Slot, check_pools, stable_hash
from datamodules.sources import RecordDataset, Source, check_sources, keep, load


class Collator(Protocol):
    """What an editor brings: how slots become its batch. It is pickled into the loader's workers."""

    def __call__(self, slots: Sequence[Slot], /) -> Any: ...

    def fits(self, record: EditRecord) -> bool:
        """Whether a record is short enough to train on."""
        ...


class Pool:
    """Records that are edited together in validation or test.

    Not a sequence and not a dataclass on purpose: Lightning would look for tensors inside, and refuse frozen records.
    """

    def __init__(self, records: Sequence[EditRecord]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)


class ScheduledLoader(DataLoader):
    """A DataLoader over a `PoolSchedule`: resumable without a state, and these methods tell Lightning so."""

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass


class _LoadAfterRestore(L.Callback):
    """Drops a loader that was made before the checkpoint's step count was restored, and would thus begin at step 0.

    `trainer.estimated_stepping_batches` makes one, where an editor asks for it in `configure_optimizers`.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fit = trainer.fit_loop
        if fit._combined_loader is not None and fit._data_fetcher is not None:
            fit._data_fetcher.teardown()
            fit._combined_loader = None


class EditDataModule(L.LightningDataModule):
    """Edit records for any editor.

    The editor brings the tokens: `lightning_module.collator()` returns a `Collator`. Training gives its batches, each
    of `records_per_batch` records in pools of varied size; validation and test give `Pool`s of records.

    The order of the records is a function of `seed` and the trainer's step count (see `PoolSchedule`): a resumed run
    goes on with the record at which the checkpoint was made. `trainer.global_step` must therefore count one for each
    `accumulate_grad_batches` micro-batches, as it does with one optimizer.

    Args:
        train: sources of the training records; those too long for the editor's limits are left out.
        val: sources of the validation records. DistillMIKE's, which are what it trains on, are left out as those are.
        test: sources of the test records.
        records_per_batch: records of a micro-batch on one rank. An optimizer step is this many records, times the
            ranks, times Trainer(accumulate_grad_batches).
        pool_sizes: how many edits a training pool has: one of these, drawn anew for each pool. A micro-batch is one
            pool or several; its last pool is cut to fit.
        pool_rates: how often each size is drawn, relative.
        val_pool: records of a validation or test pool: this many edits are made together.
        val_records: records of one validation, drawn from the sources by `seed`, always the same ones.
        seed: draws the order of the records, the pools, the queries, and the validation's records.
        num_workers: processes that read and tokenise, for each rank; 0 does it in the training process.
        cache_dir: folder of the Arrow files; Hugging Face's own cache by default.

    Raises:
        ValueError: for settings from which no pools can be drawn; it names the setting.
    """

    def __init__(
        self,
        train: list[Source],
        val: list[Source],
        test: list[Source] | None = None,
        records_per_batch: int = 128,
        pool_sizes: Sequence[int] = (8, 16, 32, 64, 128),
        pool_rates: Sequence[float] = (0.05, 0.05, 0.05, 0.15, 0.7),
        val_pool: int = 100,
        val_records: int = 100,
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        check_pools(records_per_batch, pool_sizes, pool_rates)
        for name, value in {"val_pool": val_pool, "val_records": val_records}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.train, self.val, self.test = train, val, test
        self.records_per_batch = records_per_batch
        self.pool_sizes, self.pool_rates = pool_sizes, pool_rates
        self.val_pool, self.val_records = val_pool, val_records
        self.seed, self.num_workers, self.cache_dir = seed, num_workers, cache_dir
        self._train: RecordDataset | None = None
        self._prepared: RecordDataset | None = None
        self._val: RecordDataset | None = None  # what is kept of it, for an editor that leaves something out
        self._recipe: dict[str, int] = {}  # what the order of the records depends on besides the step
        self._recipe_then: dict[str, int] = {}  # that of the checkpoint
        self._warn_of_ignored()

    @property
    def largest_pool(self) -> int:
        """The most records that a training pool has."""
        drawn = [size for size, rate in zip(self.pool_sizes, self.pool_rates, strict=True) if rate]
        return min(max(drawn), self.records_per_batch)

    def check(self, ranks: int) -> None:
        """Refuse what can be known to be wrong for so many ranks before any of them is started.

        Raises:
            ValueError: naming the setting.
            FileNotFoundError: for a file of records that is not there.
        """
        check_sources(self.train)
        for sources in (self.val, self.test):
            if sources:
                check_sources(sources)
        if ranks > 1 and self.val_records < ranks * self.val_pool:
            raise ValueError(
                f"val_records {self.val_records} are too few for {ranks} ranks with pools of val_pool {self.val_pool}: "
                f"give at least {ranks * self.val_pool}, or lower val_pool"
            )

    def prepare_data(self) -> None:
        """Build the Arrow cache on one process, so that the other ranks find it."""
        if self.trainer is None:
            load(self.train, self.cache_dir)
        elif self.trainer.state.fn == "fit":
            self._prepared = self._training_records()
        if self.val:
            self._validation_data()
        if self.test:
            load(self.test, self.cache_dir)

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        # not filtered twice: a tokenizer that was used may not be found in the cache again
        self._train, self._prepared = self._prepared or self._training_records(), None
        rank_zero_info(f"train: {len(self._train):,} records from {', '.join(s.name for s in self.train)}")
        callbacks = cast(Any, self._attached()).callbacks
        if not any(isinstance(c, _LoadAfterRestore) for c in callbacks):
            callbacks.insert(0, _LoadAfterRestore())

    def train_dataloader(self) -> ScheduledLoader:
        trainer = self._attached()
        assert self._train is not None
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError("the ranks' records are shared out here: set Trainer(use_distributed_sampler=False)")
        schedule = PoolSchedule(
            self._train.lengths,
            self.records_per_batch,
            self.pool_sizes,
            self.pool_rates,
            trainer.accumulate_grad_batches,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            weights=self._train.weights,
            shuffle=not cast(Any, trainer).overfit_batches,
        )
        self._recipe = {
            "seed": self.seed,
            "records": schedule.records,
            "records_per_step": schedule.per_step,
        }
        self._warn_of_changes()
        schedule.start = resume(trainer, len(schedule))
        return ScheduledLoader(
            self._train,
            batch_sampler=schedule,
            collate_fn=self._collator(),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=trainer.strategy.root_device.type == "cuda",
            worker_init_fn=_outlive_signals,
        )

    def state_dict(self) -> dict[str, int]:
        return self._recipe

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._recipe_then = state_dict

    def val_dataloader(self) -> DataLoader:
        return self._pools(self.validation_records(), "val")

    def test_dataloader(self) -> DataLoader:
        return self._pools(self.test_records(), "test")

    def calibration_records(self, count: int) -> list[EditRecord]:
        """Training records for an editor that takes statistics before training: `count`, drawn by `seed`."""
        assert self._train is not None, "call setup('fit') first"
        order = random.Random(stable_hash("calibration", self.seed))
        size = len(self._train)
        return self._train.records(order.sample(range(size), min(count, size)))

    def validation_records(self) -> list[EditRecord]:
        """The first `val_records` records of the validation sources in a seeded order. Works without a Trainer."""
        data = self._validation_data()
        if len(data) < self.val_records:
            rank_zero_warn(f"val_records is {self.val_records}, but the val sources have only {len(data)} records")
        order = list(range(len(data)))
        random.Random(stable_hash("val", self.seed)).shuffle(order)
        return data.records(order[: self.val_records])

    def test_records(self) -> list[EditRecord]:
        """All records of the test sources, in order (`limit` of a source takes fewer). Works without a Trainer.

        Raises:
            ValueError: if no test source is configured.
        """
        if not self.test:
            raise ValueError("no test sources are configured; set `test` of the data module")
        data = load(self.test, self.cache_dir)
        return data.records(range(len(data)))

    def _training_records(self) -> RecordDataset:
        return keep(load(self.train, self.cache_dir), self._collator().fits, "train", self.num_workers)

    def _validation_data(self) -> RecordDataset:
        """The validation sources. An editor that knows only what it was trained on (`validates_what_fits`) is not asked
        about records that are too long to train on."""
        data = load(self.val, self.cache_dir)
        if not getattr(self.trainer and self.trainer.lightning_module, "validates_what_fits", False):
            return data
        if self._val is None:
            self._val = keep(data, self._collator().fits, "val", self.num_workers)
        return self._val

    def _pools(self, records: list[EditRecord], what: str) -> DataLoader:
        """This rank's pools, the same number on every rank (unequal numbers of forwards would hang ZeRO-3)."""
        trainer = self._attached()
        world = trainer.world_size
        pools = [Pool(records[i : i + self.val_pool]) for i in range(0, len(records), self.val_pool)]
        if len(pools) > 1 and len(pools[-1]) < self.val_pool:
            pools.pop()
        taken = len(pools) // world * world
        if not taken:
            raise ValueError(
                f"{what}: {len(records)} records make {len(pools)} pools of val_pool {self.val_pool}, too few for "
                f"{world} ranks; give at least {world * self.val_pool} records (val_records, limit), or lower val_pool"
            )
        used = sum(map(len, pools[:taken]))
        if used < len(records):
            rank_zero_warn(
                f"{what}: {used} of {len(records)} records are used: {taken} whole pools of val_pool {self.val_pool} "
                f"on {world} ranks"
            )
        if len(pools[0]) < self.val_pool:
            rank_zero_warn(f"{what}: val_pool is {self.val_pool}, but there are only {len(records)} records for a pool")
        return DataLoader(cast(Any, pools[trainer.global_rank : taken : world]), batch_size=None, collate_fn=_as_it_is)

    def _attached(self) -> L.Trainer:
        if self.trainer is None:
            raise RuntimeError("no Trainer is attached; use validation_records() and test_records() without one")
        return self.trainer

    def _collator(self) -> Collator:
        make = getattr(self._attached().lightning_module, "collator", None)
        if make is None:
            raise TypeError(f"{type(self._attached().lightning_module).__name__} has no collator() to make batches")
        return cast(Callable[[], Collator], make)()

    def _warn_of_changes(self) -> None:
        """Say so if a resumed run cannot go on with the interrupted one's records."""
        then, now = self._recipe_then, self._recipe
        changed = [f"{key} {then[key]} -> {now[key]}" for key in then if then[key] != now[key]]
        if changed:
            rank_zero_warn(
                f"the order of the records is not the checkpoint's ({', '.join(changed)}): the run goes on at the "
                "same step, where some records of the epoch may come again, and some not at all"
            )

    def _warn_of_ignored(self) -> None:
        cut = [size for size, rate in zip(self.pool_sizes, self.pool_rates, strict=True) if rate]
        if max(cut) > self.records_per_batch:
            rank_zero_warn(
                f"pool_sizes has {max(cut)}, but a micro-batch has records_per_batch {self.records_per_batch} records: "
                "larger pools are cut to that"
            )
        if len(self.train) == 1 and self.train[0].weight is not None:
            rank_zero_warn("the weight of the only train source is ignored")
        if any(s.weight is not None for s in [*self.val, *(self.test or [])]):
            rank_zero_warn("weights of val and test sources are ignored: each of their records is used once")


def resume(trainer: L.Trainer, length: int) -> int:
    """Where a schedule starts, from the trainer's step count; Lightning's own counts are made to agree with it.

    Args:
        length: micro-batches of the schedule's epoch, of which Trainer(limit_train_batches) may take fewer.

    Returns:
        The `start` of the schedule, in micro-batches.

    Raises:
        ValueError: if Trainer(limit_train_batches) would end an epoch in the middle of an optimizer step.
    """
    per_step, limit = trainer.accumulate_grad_batches, trainer.limit_train_batches
    epoch = max(1, min(length, limit) if isinstance(limit, int) else int(length * limit))
    if epoch % per_step and not cast(Any, trainer).fast_dev_run:
        raise ValueError(
            f"Trainer(limit_train_batches={limit}) ends an epoch after {epoch} micro-batches, in the middle of an "
            f"optimizer step of accumulate_grad_batches {per_step}; set a multiple of that"
        )
    epochs_done, in_epoch = divmod(trainer.global_step * per_step, epoch)
    _align(cast(Any, trainer.fit_loop), trainer.global_step, epochs_done, in_epoch, epoch)
    return epochs_done * length + in_epoch


def _align(fit: Any, steps: int, epochs_done: int, in_epoch: int, epoch: int) -> None:
    """Make Lightning's loop count epochs and micro-batches as the step count says.

    Lightning ends a resumed epoch by its own counts, and they do not fit after a checkpoint

    - inside an accumulation: its gradients are lost, so the step is to be done again from its first micro-batch;
    - with another accumulation, as when a run goes on with other ranks: its micro-batches were of another size;
    - at the end of an epoch of a run with `max_steps`: Lightning would take a batch more for the finished epoch;
    - at the end of a run that was stopped within an epoch: Lightning holds that epoch for finished.
    """
    batches, epochs = fit.epoch_loop.batch_progress, fit.epoch_progress
    closed = epochs.current.ready == epochs.current.started == epochs.current.processed
    if closed and not in_epoch:
        if fit.restarting:
            _set_restarting(fit, False)
        return
    done = epochs_done * epoch + in_epoch
    right = [(done, in_epoch, epochs_done + 1)]
    if not in_epoch:
        right.append((done, epoch, epochs_done))  # all batches of the epoch are done, but it is still open
    if closed or (batches.total.processed, batches.current.processed, epochs.current.started) not in right:
        # what Lightning holds in `on_train_batch_end` of a step's last micro-batch, which it resumes from well
        for progress, processed in ((batches.total, done), (batches.current, in_epoch)):
            progress.ready = progress.started = progress.processed = processed
            progress.completed = processed - 1
        for progress in (epochs.total, epochs.current):
            progress.ready = progress.started = epochs_done + 1
            progress.processed = progress.completed = epochs_done
        batches.is_last_batch = False
        fit.epoch_loop._batches_that_stepped = steps - 1
        _set_restarting(fit, True)


def _set_restarting(fit: Any, restarting: bool) -> None:
    """Set the flag of all loops; the fit loop's own setter would overrule it."""
    _Loop.restarting.fset(fit, restarting)  # type: ignore[attr-defined]


def _outlive_signals(worker: int) -> None:
    """Leave to the training process what a signal to all processes of a job means, such as SLURM's: a worker that it
    ended would end the run before a checkpoint is saved. Workers end when their loader or the training process does."""
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _as_it_is(pool: Any) -> Any:
    return pool
