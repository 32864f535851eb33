"""Training-free editors on the validation records, beside the editor that is trained."""

import json
from collections.abc import Sequence
from hashlib import sha256
from itertools import zip_longest
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.records import EditRecord
from datamodules.schedule import stable_hash
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, evaluate, split_pools
from modules.fingerprint import weights_hash, weights_sum
from modules.metrics import summarise
from modules.protocols.conditions import have_conditions
from modules.training_free.known import known_as
from trainers.callbacks.common import EveryNth, as_loaded, by_hand, gather, seed_all, trained_editor, untouched, writers
from trainers.drawing.curves import comparison
from trainers.editors import TrainingFree, training_free
from trainers.made_of import of_facts, of_model
from trainers.records import meeting_conditions
from trainers.result_cache import ResultCache, code

Pools = list[list[list[EditRecord]]]  # of each validation pool of this rank, the pools that it is split into
Result = dict[str, Any]  # values, records and seconds_per_edit; or error


class Baselines(L.Callback):
    """At validation, runs training-free editors on the validation records and the run's own unedited model, and logs
    val/<editor>/<metric> beside the trained editor's val/<metric>, and a figure, baselines/comparison.

    Each rank takes its own validation pools; what is logged is the mean over all records. Editors run as by hand, in
    the precision of the model's weights. Their results on the same weights and records, of files that hold the same,
    are the same at each validation and in each run, so they are kept, in memory and on disk (`trainers.result_cache`).

    Questions whose conditions the unedited model does not meet are left out (RippleEdits). Validation itself asks them,
    so the trained editor is then evaluated likewise, as val/<its name>/<metric>.

    An editor that fails is named with the reason, once in a run, and the run goes on. One that leaves the model's
    weights changed ends it: what is trained from there on would be another model.

    Args:
        editors: names of configs in configs/training_free, paths, or mappings with changes (see trainers/editors.py).
        every_n_validations: run at the first validation and every n-th after it; 0: at the first alone.
        pool_size: edits that are made together. By default those of the validation, so that figures can be compared;
            where it is given, or `records`, the trained editor is evaluated likewise, as val/<its name>/<metric>.
        records: take so many validation records at most, in whole validation pools, and at least one of each rank.
        exact_match: also generate and compare whole answers.
        batch_size: queries in one forward pass.
        cache: keep results on disk.
        cache_dir: where; by default see `trainers.result_cache.ResultCache`.
        seed: of what editors draw.

    Raises:
        ValueError: for an editor that is not known or not rightly configured, or two of one name.
    """

    def __init__(
        self,
        editors: list[dict[str, Any] | str],
        every_n_validations: int = 1,
        pool_size: int | None = None,
        records: int | None = None,
        exact_match: bool = False,
        batch_size: int = 32,
        cache: bool = True,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        self.editors = [training_free(spec) for spec in editors]
        names = [e.name for e in self.editors]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"Baselines needs editors of different names (give them a `name`), got: {names}")
        if every_n_validations < 0 or min(n for n in (pool_size, records, batch_size) if n is not None) < 1:
            raise ValueError(
                "every_n_validations must not be negative, pool_size, records and batch_size at least 1: "
                f"{every_n_validations}, {pool_size}, {records}, {batch_size}"
            )
        self.validations, self.pool_size, self.records = EveryNth(every_n_validations), pool_size, records
        self.options = {"exact_match": exact_match, "batch_size": batch_size}
        self.disk = ResultCache(cache_dir) if cache else None
        self.seed = seed
        self._likewise = bool(pool_size or records)  # whether the trained editor is evaluated here too
        self._kept: tuple[Pools, Pools] | None = None  # the pools, and what is asked of them where there are conditions
        self._together = 0  # edits of one pool
        self._memory: dict[str, Result] = {}  # by the key's text
        self._weights: tuple[int, str] | None = None  # the sum of the weights, and the hash that goes with it
        self._originals: Answers | None = None
        self._others: dict[str, dict[str, float]] = {}
        self._trained: dict[str, float] | None = None
        self._curve: list[tuple[int, dict[str, float]]] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trained = None
        if not self.validations.looks(trainer):
            return
        pools = self._pools(trainer)
        self._others = {}
        with by_hand(pl_module) as backbone:
            pools = self._meeting_conditions(trainer, backbone, pools)
            for editor, result in zip(self.editors, self._results(trainer, backbone, pools), strict=True):
                if "error" not in result:
                    self._others[editor.name] = result["values"]
                    self._log(trainer, pl_module, editor.name, result)
        if self._likewise:
            self._trained = self._evaluate_trained(trainer, pl_module, pools)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The figure, once the trained editor's own metrics are there."""
        if trainer.sanity_checking:
            return
        own = {k.removeprefix("val/"): float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if not self._likewise:
            self._curve.append((trainer.global_step, own))
        elif self._trained is not None:
            self._curve.append((trainer.global_step, self._trained))
        for file in writers(trainer):
            steps, values = zip(*self._curve, strict=True)
            name = trained_editor(pl_module).editor().name
            figure = comparison(steps, name, values, self._others, f"{self._together} edits together")
            file.add_figure("baselines/comparison", figure, trainer.global_step)

    def _pools(self, trainer: L.Trainer) -> Pools:
        """This rank's part of the records."""
        loaders: Any = trainer.val_dataloaders
        found = [list(pool.records) for pool in loaders.dataset][: int(trainer.num_val_batches[0])]
        if self.records:
            found = found[: max(1, self.records // (max(map(len, found)) * trainer.world_size))]
        parts = [split_pools(pool, self.pool_size or len(pool))[0] for pool in found]
        self._together = max(len(part) for pool in parts for part in pool)
        return [[list(part) for part in pool] for pool in parts]

    def _meeting_conditions(self, trainer: L.Trainer, backbone: Backbone, pools: Pools) -> Pools:
        records = [record for pool in pools for part in pool for record in part]
        if not any(gather(trainer, have_conditions(records))):
            return pools
        self._likewise = True
        if self._kept is None or self._kept[0] != pools:  # the run's unedited model stays what it is
            kept = iter(meeting_conditions(backbone, records, self.options["batch_size"]))
            self._kept = pools, [[[next(kept) for _ in part] for part in pool] for pool in pools]
        return self._kept[1]

    def _results(self, trainer: L.Trainer, backbone: Backbone, pools: Pools) -> list[Result]:
        """One result of each editor, the same on every rank."""
        before = weights_sum(backbone.model)
        setting = self._setting(trainer, backbone, pools, before)
        results = []
        for editor in self.editors:
            key = setting | {"editor": f"{editor.kind.__module__}.{editor.kind.__qualname__}"}
            key |= of_facts({"init_args": editor.resolved(known_as(backbone))})
            known = self._known(key) if trainer.is_global_zero else None
            result: Result | None = trainer.strategy.broadcast(known)
            if result is None:
                rank_zero_info(f"validating {editor.name} ...")
                result = self._run(trainer, editor, backbone, pools, before)
                self._memory[_text(key)] = result
                if "error" in result:
                    _tell(trainer, editor.name, result["error"])
                elif self.disk and trainer.is_global_zero:
                    self.disk.put(key, result)
            results.append(result)
        return results

    def _setting(self, trainer: L.Trainer, backbone: Backbone, pools: Pools, weights: int) -> dict[str, Any]:
        """What results hang on besides the editor."""
        if self._weights is None or self._weights[0] != weights:
            self._weights = weights, weights_hash(backbone.model) if trainer.is_global_zero else ""
            self._originals = Answers(Edited(backbone))
        assert self._originals is not None
        self._originals.model = Edited(backbone)
        told = [_text([[r.to_json() for r in part] for part in pool]) for pool in pools]
        records = sha256(_text(_in_order(gather(trainer, told))).encode()).hexdigest()
        model = of_model(backbone, self._weights[1])
        return {**model, "records": records, **self.options, "seed": self.seed, "code": code()}

    def _known(self, key: dict[str, Any]) -> Result | None:
        return self._memory.get(_text(key)) or (self.disk.get(key) if self.disk else None)

    def _run(self, trainer: L.Trainer, config: TrainingFree, backbone: Backbone, pools: Pools, before: int) -> Result:
        """Evaluate an editor on all ranks. Whatever goes wrong on one of them, each comes to the end of this."""
        try:
            with as_loaded(backbone.model):  # what one leaves behind, the next does not find
                mine = "", *self._evaluate(trainer, config.build(backbone), backbone, pools, self._originals)
        except Exception as error:  # hours of training go on, whatever an editor does
            mine = f"{type(error).__name__}: {error}", [], 0.0
        every = gather(trainer, (*mine, weights_sum(backbone.model) != before))
        if any(changed for *_, changed in every):
            raise RuntimeError(
                f"Baselines: {config.name} left the model's weights changed, so the run cannot go on; an editor must "
                "put back what it changes (modules/editor.py). Take it out"
            )
        errors = [error for error, *_ in every if error]
        if errors:
            return {"error": errors[0]}
        return _summary([results for _, results, *_ in every], sum(seconds for _, _, seconds, _ in every))

    def _evaluate(
        self, trainer: L.Trainer, editor: Editor, backbone: Backbone, pools: Pools, originals: Answers | None
    ) -> tuple[list[list[dict[str, Any]]], float]:
        """Per-record results of each of this rank's validation pools, and the seconds spent on edits."""
        results, seconds = [], 0.0
        for i, pool in enumerate(pools):
            place = i * trainer.world_size + trainer.global_rank  # the pool's among those of all ranks
            found = []
            for j, part in enumerate(pool):
                seed_all(stable_hash("baselines", self.seed, place, j))
                one = evaluate(editor, backbone, part, len(part), **self.options, originals=originals)
                found += one.records
                seconds += one.edit_seconds
            results.append(found)
        return results, seconds

    def _evaluate_trained(self, trainer: L.Trainer, module: L.LightningModule, pools: Pools) -> dict[str, float]:
        """The trained editor on the same pools, in the precision of the training, as in validation."""
        trained = trained_editor(module)
        with untouched(module), trainer.precision_plugin.forward_context():
            with trained.original() as backbone:
                originals = Answers(Edited(backbone))
                # asked here in whole, the original is not needed while an edit is in place
                originals.ask([r for pool in pools for part in pool for r in part], **self.options)
            editor = trained.editor()
            results, seconds = self._evaluate(trainer, editor, backbone, pools, originals)
        every = gather(trainer, (results, seconds))
        result = _summary([results for results, _ in every], sum(seconds for _, seconds in every))
        self._log(trainer, module, editor.name, result)
        return result["values"]

    def _log(self, trainer: L.Trainer, module: L.LightningModule, name: str, result: Result) -> None:
        values = result["values"] | {"seconds_per_edit": result["seconds_per_edit"]}
        wide = {"dtype": torch.float64, "device": module.device}  # NCCL takes tensors of the GPU alone
        tags = {f"val/{name}/{metric}": torch.tensor(value, **wide) for metric, value in values.items()}
        module.log_dict(tags, sync_dist=trainer.world_size > 1)  # equal on all ranks, which the mean leaves as it is


def _summary(of_ranks: Sequence[Sequence[Sequence[dict[str, Any]]]], seconds: float) -> Result:
    results = [result for pool in _in_order(of_ranks) for result in pool]
    edits = sum(len(w) if isinstance(w := r["requested_rewrite"], list) else 1 for r in results)
    values = {metric: cell["value"] for metric, cell in summarise(results, resamples=1).items()}
    return {"values": values, "records": len(results), "seconds_per_edit": seconds / max(1, edits)}


def _in_order(of_ranks: Sequence[Sequence[Any]]) -> list[Any]:
    """What the ranks have of their validation pools, in the order of all pools: rank r of W has r, r + W, ..."""
    nothing = object()
    return [x for row in zip_longest(*of_ranks, fillvalue=nothing) for x in row if x is not nothing]


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _tell(trainer: L.Trainer, name: str, reason: str) -> None:
    rank_zero_warn(f"Baselines: {name} failed and is left out of this run: {reason}")
    for file in writers(trainer):
        file.add_text(f"baselines/failures/{name}", reason, trainer.global_step)
