"""The data module under a real Trainer: what a module sees, and that a resumed run sees what follows."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import Logger

from datamodules.edits import EditDataModule, Pool, ScheduledLoader
from datamodules.records import EditRecord
from datamodules.schedule import Slot
from datamodules.sources import Source

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
RECORDS = 47  # no multiple of anything below: each epoch has a tail


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("arrow"))


class Plain:
    """A collator that keeps the slots in sight."""

    def __call__(self, slots: Sequence[Slot]) -> dict[str, Any]:
        x = torch.tensor([s.seed % 997 / 997 for s in slots])
        return {"slots": [(s.record.id, s.pool, s.seed) for s in slots], "x": x}

    def fits(self, record: EditRecord) -> bool:
        return True


class Short(Plain):
    def fits(self, record: EditRecord) -> bool:
        return len(record.request.prompt) < 40


class Seen(L.LightningModule):
    """One parameter that follows the data, and a list of all that was seen."""

    def __init__(self, collator: Plain | None = None, asks_for_steps: bool = False) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.made, self.asks_for_steps = collator or Plain(), asks_for_steps
        self.seen: list[list[tuple[str, int, int]]] = []
        self.pools: list[Pool] = []

    def collator(self) -> Plain:
        return self.made

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self.seen.append(batch["slots"])
        loss = ((self.w - batch["x"]) ** 2).mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, pool: Pool, _: int) -> None:
        self.pools.append(pool)

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.asks_for_steps:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Steps(Logger):
    """At which steps the loss was logged."""

    name = version = "steps"

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int | None] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if "loss" in metrics:
            self.steps.append(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class SaveEverywhere(L.Callback):
    """Saves after each micro-batch, each validation, each epoch and at the end: {name: micro-batches done}."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = folder, 0
        self.saved: dict[Path, int] = {}

    def _save(self, trainer: L.Trainer, when: str) -> None:
        path = self.folder / f"{when}-{self.done}.ckpt"
        trainer.save_checkpoint(path)
        self.saved[path] = self.done

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.done += 1
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        if not trainer.sanity_checking:
            self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "epoch")

    def on_train_end(self, trainer: L.Trainer, *args: Any) -> None:
        self._save(trainer, "end")


def data(cache: str, **more: Any) -> EditDataModule:
    sources = [Source("facts", options={"split": "val"}, limit=RECORDS)]
    settings = {"records_per_batch": 4, "pool_sizes": [1, 2, 3], "pool_rates": [1, 1, 1], "val_pool": 5}
    settings |= {"val_records": 10, "seed": 3, "cache_dir": cache, **more}
    return EditDataModule(sources, sources, **settings)


def fit(
    datamodule: EditDataModule, callbacks: Sequence[L.Callback] = (), module: Seen | None = None, **more: Any
) -> SimpleNamespace:
    """Fit a fresh module; what it saw, where it ended."""
    path = more.pop("ckpt_path", None)
    module, logger = module or Seen(), Steps()
    trainer = L.Trainer(callbacks=list(callbacks), logger=logger, log_every_n_steps=1, **quiet(), **more)
    trainer.fit(module, datamodule, ckpt_path=path)
    return SimpleNamespace(
        seen=module.seen, w=module.w.item(), steps=trainer.global_step, logged=logger.steps, pools=module.pools
    )


def quiet() -> dict[str, Any]:
    off = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    return {"accelerator": "cpu", "devices": 1, **dict.fromkeys(off, False)}


def slots(batches: list[list[tuple[str, int, int]]]) -> list[tuple[str, int]]:
    """Records and seeds, without the pools."""
    return [(record, seed) for batch in batches for record, _, seed in batch]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2},
        {"max_steps": 14, "limit_val_batches": 0},
        {"max_steps": 14, "check_val_every_n_epoch": None, "val_check_interval": 4},
        {"max_epochs": 2, "limit_train_batches": 6},
    ],
    ids=["epochs", "steps", "validation_by_steps", "limited"],
)
def test_a_resumed_run_sees_what_follows(cache: str, tmp_path: Path, accumulate: int, settings: dict[str, Any]) -> None:
    settings = {"accumulate_grad_batches": accumulate, **settings}
    saver = SaveEverywhere(tmp_path)
    whole = fit(data(cache), [saver], **settings)
    epoch = settings.get("limit_train_batches", RECORDS // 4 // accumulate * accumulate)
    assert len(whole.seen) > epoch
    places = sorted(saver.saved, key=lambda p: (saver.saved[p], p.name))
    # every place around the first border, and a few before and after
    for path in [p for p in places if abs(saver.saved[p] - epoch) < 3 or saver.saved[p] in (1, 3, epoch + 5)]:
        done = saver.saved[path] // accumulate * accumulate  # a step that was not finished is done again
        resumed = fit(data(cache), ckpt_path=path, **settings)
        assert resumed.seen == whole.seen[done:], path.name
        assert (resumed.w, resumed.steps) == (whole.w, whole.steps), path.name
        assert resumed.logged == whole.logged[len(whole.logged) - len(resumed.logged) :], path.name


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_max_steps_stopped_goes_on(cache: str, tmp_path: Path, accumulate: int) -> None:
    settings = {"accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    whole = fit(data(cache), max_steps=14, **settings)
    saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=3)
    enabled = {"enable_checkpointing": True}
    trainer = L.Trainer(callbacks=[saver], logger=False, max_steps=7, **{**quiet(), **enabled}, **settings)
    trainer.fit(Seen(), data(cache))
    trainer.save_checkpoint(tmp_path / "step=7.ckpt")
    for step in (3, 6, 7):
        resumed = fit(data(cache), max_steps=14, ckpt_path=tmp_path / f"step={step}.ckpt", **settings)
        assert resumed.seen == whole.seen[step * accumulate :]
        assert resumed.w == whole.w


class StopAt(L.Callback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
        trainer.should_stop = len(module.seen) == self.batches  # type: ignore[arg-type]


def test_a_run_that_was_stopped_early_goes_on(cache: str, tmp_path: Path) -> None:
    whole = fit(data(cache), max_epochs=3)
    stopped = fit(data(cache), [StopAt(15), SaveEverywhere(tmp_path)], max_epochs=3)
    assert len(stopped.seen) == 15
    for name in ("batch-15", "epoch-15", "end-15"):
        resumed = fit(data(cache), max_epochs=3, num_sanity_val_steps=0, ckpt_path=tmp_path / f"{name}.ckpt")
        assert resumed.seen == whole.seen[15:], name
        assert len(resumed.pools) == 4, name  # validation at the end of the second epoch and of the third
        assert (resumed.w, resumed.steps) == (whole.w, whole.steps), name


def test_an_epoch_that_only_has_to_be_closed_is_closed(cache: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    fit(data(cache), [SaveEverywhere(first)], max_epochs=2)
    saver = SaveEverywhere(second)
    fit(data(cache), [saver], max_epochs=2, ckpt_path=first / "validation-11.ckpt")
    assert [path.name for path in saver.saved if "epoch" in path.name] == ["epoch-0.ckpt", "epoch-11.ckpt"]


@pytest.mark.parametrize(("then", "now"), [((4, 2), (8, 1)), ((8, 1), (4, 2)), ((2, 4), (4, 2))])
def test_a_run_goes_on_with_another_accumulation(
    cache: str, tmp_path: Path, then: tuple[int, int], now: tuple[int, int]
) -> None:
    """As when a run goes on with other ranks: an optimizer step remains the same 8 slots."""
    saver = SaveEverywhere(tmp_path)
    whole = fit(data(cache, records_per_batch=then[0]), [saver], max_epochs=2, accumulate_grad_batches=then[1])
    for path, done in saver.saved.items():
        step = done // then[1]
        if 3 <= step <= 6:
            resumed = fit(
                data(cache, records_per_batch=now[0]), max_epochs=2, accumulate_grad_batches=now[1], ckpt_path=path
            )
            assert slots(resumed.seen) == slots(whole.seen)[8 * step :], path.name
            assert resumed.w == pytest.approx(whole.w, abs=1e-5)


def test_resume_is_right_if_the_loader_is_asked_for_early(cache: str, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole = fit(data(cache), [saver], Seen(asks_for_steps=True), **settings)
    for path in (tmp_path / "batch-4.ckpt", tmp_path / "epoch-10.ckpt"):
        resumed = fit(data(cache), module=Seen(asks_for_steps=True), ckpt_path=path, **settings)
        assert resumed.seen == whole.seen[saver.saved[path] :]


def test_workers_do_not_change_what_is_seen(cache: str, tmp_path: Path) -> None:
    settings = {"max_epochs": 2, "limit_val_batches": 0}
    saver = SaveEverywhere(tmp_path)
    alone = fit(data(cache), [saver], **settings)
    assert fit(data(cache, num_workers=1), ckpt_path=tmp_path / "batch-9.ckpt", **settings).seen == alone.seen[9:]


def test_a_change_of_the_data_is_told_at_a_resume(cache: str, tmp_path: Path) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data(cache), [saver], max_steps=3, limit_val_batches=0)
    with pytest.warns(UserWarning, match=r"not the checkpoint's \(seed 3 -> 4\)"):
        fit(data(cache, seed=4), max_steps=5, limit_val_batches=0, ckpt_path=tmp_path / "batch-3.ckpt")


def test_lightning_takes_the_loader_for_resumable(cache: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    saver = SaveEverywhere(tmp_path)
    fit(data(cache), [saver], max_steps=3, limit_val_batches=0)
    fit(data(cache), max_steps=5, limit_val_batches=0, ckpt_path=tmp_path / "batch-3.ckpt")
    assert not [w for w in recwarn if "not resumable" in str(w.message)]


def test_an_epoch_has_each_record_once_and_the_next_another_order(cache: str) -> None:
    seen = fit(data(cache), max_epochs=2, limit_val_batches=0).seen
    epochs = [[record for batch in seen[i : i + 11] for record, *_ in batch] for i in (0, 11)]
    assert len(seen) == 22
    assert all(len(set(e)) == 44 for e in epochs)
    assert epochs[0] != epochs[1]


def test_records_over_the_limits_are_left_out(cache: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = fit(data(cache), module=Seen(Short()), max_epochs=1, limit_val_batches=0)
    everyone = {r.id: r for r in data(cache, val_records=RECORDS).validation_records()}
    seen = {record for batch in run.seen for record, *_ in batch}
    assert seen
    assert all(len(everyone[record].request.prompt) < 40 for record in seen)
    fitting = sum(len(r.request.prompt) < 40 for r in everyone.values())
    assert f"left out {RECORDS - fitting} of {RECORDS} records longer than the limits (train)" in caplog.text


def test_the_filter_runs_once_although_its_use_changes_the_collator(cache: str) -> None:
    class Counting(Plain):
        calls = 0

        def fits(self, record: EditRecord) -> bool:
            self.calls += 1  # as a tokenizer that keeps what it has seen
            Counting.calls += 1
            return True

    fit(data(cache), module=Seen(Counting()), max_steps=1, limit_val_batches=0)
    assert Counting.calls == RECORDS


def test_validation_is_the_same_pools_each_time(cache: str) -> None:
    pools = fit(data(cache), max_epochs=2, num_sanity_val_steps=0).pools
    ids = [[r.id for r in pool.records] for pool in pools]
    assert [len(i) for i in ids] == [5, 5, 5, 5]
    assert ids[:2] == ids[2:]
    expected = [r.id for r in data(cache).validation_records()]
    assert ids[0] + ids[1] == expected
    assert expected != [r.id for r in data(cache, seed=4).validation_records()]


def test_test_pools_are_all_test_records(cache: str) -> None:
    module = data(cache)
    with pytest.raises(ValueError, match="no test sources are configured; set `test`"):
        module.test_records()
    module.test = [Source("facts", options={"split": "test"}, limit=10)]
    model = Seen()
    L.Trainer(logger=False, **quiet()).test(model, module, verbose=False)
    assert [r.id for pool in model.pools for r in pool.records] == [r.id for r in module.test_records()]
    assert len(model.pools) == 2


def trainer_of(world_size: int, rank: int = 0, **more: Any) -> Any:
    """What the data module asks of a Trainer, for ranks that are not there."""
    connector = SimpleNamespace(use_distributed_sampler=more.pop("use_distributed_sampler", False))
    progress = {name: SimpleNamespace(ready=0, started=0, processed=0, completed=0) for name in ("total", "current")}
    fit_loop = SimpleNamespace(
        epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(**progress)),
        epoch_progress=SimpleNamespace(**progress),
        restarting=False,
    )
    settings = {"limit_train_batches": 1.0, "accumulate_grad_batches": 1, "fast_dev_run": False, "overfit_batches": 0}
    settings |= {"global_step": 0, "fit_loop": fit_loop, "callbacks": [], "lightning_module": Seen()}
    settings |= {"strategy": SimpleNamespace(root_device=torch.device("cpu")), "_accelerator_connector": connector}
    return SimpleNamespace(**{**settings, "world_size": world_size, "global_rank": rank, **more})


def on_rank(cache: str, world_size: int, rank: int = 0, settings: dict[str, Any] | None = None, **more: Any) -> Any:
    module = data(cache, **(settings or {}))
    module.trainer = trainer_of(world_size, rank, **more)
    module.setup("fit")
    return module


def test_ranks_share_the_records_and_the_pools(cache: str) -> None:
    ranks = [on_rank(cache, 2, rank) for rank in range(2)]
    seen = [{record for batch in m.train_dataloader() for record, *_ in batch["slots"]} for m in ranks]
    assert len(seen[0]) == len(seen[1]) == 20
    assert not seen[0] & seen[1]
    pools = [[[r.id for r in pool.records] for pool in m.val_dataloader()] for m in ranks]
    expected = [r.id for r in data(cache).validation_records()]
    assert pools == [[expected[:5]], [expected[5:]]]


def test_the_loader_has_the_batch_size_that_deepspeed_looks_for(cache: str) -> None:
    loader = on_rank(cache, 1).train_dataloader()
    assert isinstance(loader, ScheduledLoader)
    assert loader.batch_sampler.batch_size == 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: on_rank(c, 2, use_distributed_sampler=True).train_dataloader(), "use_distributed_sampler=False"),
        (lambda c: on_rank(c, 3).val_dataloader(), r"too few for 3 ranks; give at least 15 records \(val_records"),
        (
            lambda c: on_rank(c, 1, limit_train_batches=5, accumulate_grad_batches=2).train_dataloader(),
            r"limit_train_batches=5\) ends an epoch after 5 micro-batches.* accumulate_grad_batches 2",
        ),
        (
            lambda c: on_rank(c, 1, accumulate_grad_batches=12).train_dataloader(),
            "47 records do not fill one optimizer",
        ),
        (lambda c: data(c, val_pool=0), "val_pool must be at least 1"),
        (lambda c: data(c, pool_rates=[1]), "pool_rates must have one rate"),
    ],
)
def test_wrong_settings_are_named(cache: str, act: Callable[[str], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act(cache)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda c: data(c, pool_sizes=[2, 3, 64]), "pool_sizes has 64, but .* records_per_batch 4"),
        (lambda c: data(c, val_records=99).validation_records(), "val_records is 99, but .* only 47"),
        (lambda c: on_rank(c, 1, settings={"val_pool": 4}).val_dataloader(), "8 of 10 records are used"),
        (lambda c: on_rank(c, 1, settings={"val_pool": 20}).val_dataloader(), "val_pool is 20, but .* only 10"),
        (lambda c: EditDataModule([Source("facts", weight=2)], []), "weight of the only train source is ignored"),
        (lambda c: EditDataModule([Source("facts")], [Source("facts", weight=2)]), "weights of val and test"),
    ],
)
def test_ignored_settings_are_told(cache: str, act: Callable[[str], Any], message: str) -> None:
    with pytest.warns(UserWarning, match=message):
        act(cache)
