"""The run's result: the test records before and after training, beside the baselines."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from datamodules.records import EditRecord
from datamodules.sources import described
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, check_queries_per_kind, evaluate
from trainers.callbacks.common import trained_editor, untouched
from trainers.columns import COLUMNS
from trainers.editors import BASELINES
from trainers.records import drawn, meeting_conditions
from trainers.report import Report, add_evaluation, add_failure, new_report
from trainers.report_table import print_table
from trainers.written import write_json

UNTRAINED = " (untrained)"  # after the editor's name, before the first step


class FinalEvaluation(L.Callback):
    """Evaluates the trained editor on the DataModule's test records by the protocols of `trainers.evaluate`.

    Before the first step of a run come the untrained editor (named "<editor> (untrained)") and the baselines; after the
    last step the trained editor. The results go to evaluation.json in the logger's folder, to the terminal as a table,
    and as metrics of the hyperparameters to TensorBoard (final/<metric>_at_<edits>). A resumed run keeps the rows that
    the file holds. A row that fails, as in-context learning beyond the context window does, is marked with the reason.
    `meta.step` is the step of the trained editor, by which trainers.export knows whose figures these are.
    A run that is ended during this evaluation has made its last step: going on with it only says what is missing.

    The models run in the precision of the training (autocast under bf16-mixed), as in validation. Questions whose
    conditions the unedited model does not meet are left out (RippleEdits).

    All ranks do the same work, since sharded weights (ZeRO-3) want every rank in every forward pass; rank 0 writes.

    Args:
        pool_sizes: how many edits stand at once; by default 1, 10 and 100, never more than there are records.
        records: how many test records, drawn by `seed`.
        exact_match: also generate and compare whole answers.
        before: evaluate the untrained editor too.
        baselines: evaluate the unedited model, in-context learning with all edits, and with the right edit alone.
        pool_1_records: at pool size 1, where each record is a pool of its own, take only so many records.
        queries_per_kind: ask only so many rephrases, and locality and portability queries of each kind, of a record.
        batch_size: queries in one forward pass.
        seed: draws the records and their queries, and the bootstrap.
    """

    def __init__(
        self,
        pool_sizes: list[int] | None = None,
        records: int = 100,
        exact_match: bool = True,
        before: bool = True,
        baselines: bool = True,
        pool_1_records: int = 20,
        queries_per_kind: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        self.pool_sizes = [1, 10, 100] if pool_sizes is None else pool_sizes
        if not self.pool_sizes or min(*self.pool_sizes, records, pool_1_records) < 1:
            raise ValueError(
                f"pool_sizes, records and pool_1_records must be at least 1: {pool_sizes}, {records}, {pool_1_records}"
            )
        check_queries_per_kind(queries_per_kind)
        self.records, self.exact_match, self.before, self.baselines = records, exact_match, before, baselines
        self.pool_1_records, self.batch_size, self.seed = pool_1_records, batch_size, seed
        self.queries_per_kind = queries_per_kind
        self._report: Report = {}
        self._ended = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trained_editor(pl_module)
        found = drawn_records(trainer, self.records, self.seed, self.queries_per_kind)
        self._records, self._data, self._available = found
        self._sizes = sorted({min(size, len(self._records)) for size in self.pool_sizes})
        self._path = Path(trainer.log_dir or trainer.default_root_dir) / "evaluation.json"
        self._originals: Answers | None = None
        self._ended = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0:
            self._report = {}
            self._evaluate(trainer, pl_module, UNTRAINED if self.before else None)
        elif self._path.is_file():
            self._report = json.loads(self._path.read_text(encoding="utf-8"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._ended = True
        self._evaluate(trainer, pl_module, "")
        if trainer.is_global_zero:
            print_table(self._report)
            print(f"written to {self._path}")
        name = trained_editor(pl_module).editor().name
        metrics = flat_metrics(self._report["aggregate"][name])
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(settings(trainer, name), metrics, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of a run that had no step left to make, for which Lightning calls no other hook: here the weights have left
        their devices, and their shards, so that nothing can be evaluated any more."""
        if (
            trainer.is_global_zero
            and trainer.global_step
            and not self._ended
            and not self._has_trained(trainer.global_step)
        ):
            print(
                f"the run had made its last step already, so that nothing is evaluated now, and {self._path} has no "
                "whole row of the trained editor. Export the run (python -m trainers.export), and evaluate that "
                "(python -m trainers.evaluate)",
                flush=True,
            )

    def _has_trained(self, step: int) -> bool:
        """Whether the file has this step's editor with the largest pool, which is the last to be asked."""
        report = json.loads(self._path.read_text(encoding="utf-8")) if self._path.is_file() else {}
        rows = report.get("aggregate", {})
        trained = [row for name, row in rows.items() if name not in BASELINES and not name.endswith(UNTRAINED)]
        return report.get("meta", {}).get("step") == step and any(str(self._sizes[-1]) in row for row in trained)

    def _evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, suffix: str | None) -> None:
        """Add the baselines that the report lacks and, unless `suffix` is None, the editor under its name + suffix."""
        module = trained_editor(pl_module)
        with untouched(pl_module), trainer.precision_plugin.forward_context():
            with module.original() as backbone:
                if self._originals is None:
                    self._records = meeting_conditions(backbone, self._records, self.batch_size)
                    self._originals = Answers(Edited(backbone))
                # asked here in whole, the original is not needed while an edit is in place
                self._originals.ask(self._records, self.exact_match, self.batch_size)
                self._report = self._report or new_report(
                    backbone,
                    self._records,
                    self._sizes,
                    data=self._data,
                    seed=self.seed,
                    queries_per_kind=self.queries_per_kind,
                    available=self._available,
                )
                for baseline in (kind() for kind in BASELINES.values() if self.baselines):
                    if baseline.name not in self._report["aggregate"]:
                        self._add(trainer, baseline.name, baseline, backbone)
            if suffix is not None:
                editor = module.editor()
                if not suffix:
                    self._of_step(editor.name, trainer.global_step)
                self._add(trainer, editor.name + suffix, editor, backbone)

    def _of_step(self, name: str, step: int) -> None:
        """Make room for the trained editor's row, whose step the report tells: a resumed run's file has an earlier one,
        maybe at other pool sizes."""
        for part in ("aggregate", "runs", "records"):
            self._report[part].pop(name, None)
        self._report["meta"]["step"] = step

    def _add(self, trainer: L.Trainer, name: str, editor: Editor, backbone: Backbone) -> None:
        for size in self._sizes if editor.reads_pool else self._sizes[-1:]:
            rank_zero_info(f"evaluating {name} with {size} edits ...")
            try:
                found = evaluate(
                    editor,
                    backbone,
                    self._records[: self.pool_1_records] if size == 1 else self._records,
                    size,
                    exact_match=self.exact_match,
                    batch_size=self.batch_size,
                    seed=self.seed,
                    originals=self._originals,
                )
            except (ValueError, RuntimeError) as error:  # hours of training end with a mark, not with a traceback
                add_failure(self._report, name, size, f"{type(error).__name__}: {error}")
            else:
                add_evaluation(self._report, replace(found, editor=name))
        if trainer.is_global_zero:
            write_json(self._path, self._report)


def drawn_records(
    trainer: L.Trainer, count: int, seed: int, queries_per_kind: int | None = None
) -> tuple[list[EditRecord], str, int]:
    """`count` test records of the run's DataModule, drawn as `trainers.evaluate` does, where they come from, and of how
    many they were drawn.

    Raises:
        TypeError: where the DataModule offers none.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if not hasattr(datamodule, "test_records"):
        raise TypeError("FinalEvaluation needs a DataModule with test_records(), such as EditDataModule")
    every: list[EditRecord] = datamodule.test_records()  # type: ignore[union-attr]
    chosen = drawn(lambda at: [every[i] for i in at], len(every), count, seed, queries_per_kind)
    sources = described(getattr(datamodule, "test", None) or [])
    return chosen, sources, len(every)


def flat_metrics(by_size: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The headline metrics of one editor, under names that TensorBoard shows as one group."""
    return {
        f"final/{metric.replace('/', '_')}_at_{size}": cell[metric]["value"]
        for size, cell in by_size.items()
        for metric, *_ in COLUMNS
        if metric in cell
    }


def settings(trainer: L.Trainer, editor: str) -> dict[str, Any]:
    """What tells one run from another: its steps and, where the command line built it, its resolved config."""
    made = {"editor": editor, "steps": trainer.global_step}
    saved = next((c for c in getattr(trainer, "callbacks", []) if isinstance(c, SaveConfigCallback)), None)
    if saved is None:
        return made
    config = saved.config.as_dict()
    return made | {key: config[key] for key in ("seed_everything", "model", "data") if key in config}
