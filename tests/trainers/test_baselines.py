"""Training-free editors in real runs of the tiny configs: what is logged and kept, and that training is untouched."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from deltas import Nudge
from ranks import ONE, TWO, perform, together, zero
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from datamodules.readers import read
from datamodules.records import EditRecord, Query
from modules.backbone import Backbone
from modules.editor import Edited
from modules.evaluation import Answers, evaluate
from modules.metrics import summarise
from trainers.callbacks import baselines
from trainers.callbacks.baselines import Baselines
from trainers.callbacks.common import as_loaded, seed_all
from trainers.cli import TrainingCLI
from trainers.result_cache import ResultCache

pytestmark = pytest.mark.filterwarnings("ignore")
METRIC = "reliability/token_accuracy"
CONFIG = {"class_path": "deltas.Nudge", "init_args": {"layers": [1]}}


@pytest.fixture
def nudge(tmp_path: Path) -> str:
    Nudge.calls.clear()
    path = tmp_path / "nudge.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return str(path)


def run(folder: Path, callbacks: Sequence[Any], config: str = "mend_tiny", steps: int = 2, *more: str) -> Any:
    """A run with a validation after each step; and what it left."""
    quiet = [f"--trainer.{what}=false" for what in ("enable_progress_bar", "enable_model_summary")]
    quiet += ["--checkpoint.at_end=false", "--checkpoint.monitor=null", "--checkpoint.mode=max"]
    args = [f"--config={config}", f"--run_dir={folder}", f"--trainer.max_steps={steps}", "--trainer.callbacks=[]"]
    cli = TrainingCLI([*args, *quiet, "--trainer.val_check_interval=1", "--data.init_args.val_records=10", *more])
    cli.trainer.callbacks += callbacks
    cli.trainer.fit(cli.model, cli.datamodule)
    events = EventAccumulator(str(folder), dict.fromkeys(("images", "scalars", "tensors"), 0)).Reload()
    state = {n: t.clone() for n, t in cli.model.state_dict().items()}
    draws = torch.rand(1).item(), np.random.rand(), random.random()
    modes = {n: (m.training, len(m._forward_hooks)) for n, m in cli.model.named_modules()}
    needs = {n: p.requires_grad for n, p in cli.model.named_parameters()}
    left = SimpleNamespace(state=state, draws=draws, modes=modes, needs=needs)
    return SimpleNamespace(events=events, left=left, trainer=cli.trainer, module=cli.model)


def callback(tmp_path: Path, *editors: Any, **options: Any) -> Baselines:
    return Baselines(list(editors), cache_dir=str(tmp_path / "cache"), **options)


def val_records() -> list[EditRecord]:
    return list(islice(read("facts", split="val"), 10))


def scalars(found: Any, tag: str) -> list[float]:
    return [event.value for event in found.events.Scalars(tag)]


def same(one: Any, two: Any) -> None:
    assert one.left.state.keys() == two.left.state.keys()
    assert all(torch.equal(t, two.left.state[n]) for n, t in one.left.state.items())
    for what in ("draws", "modes", "needs"):
        assert getattr(one.left, what) == getattr(two.left, what), what


@pytest.mark.parametrize(
    ("config", "more"),
    [
        ("mend_tiny", ["--model.init_args.gradient_checkpointing=true", "--trainer.accumulate_grad_batches=2"]),
        ("incomes_tiny", []),
        ("incomes_tiny", ["--model.init_args.train=lora"]),
    ],
)
def test_training_is_bit_equal_with_and_without(tmp_path: Path, nudge: str, config: str, more: list[str]) -> None:
    """Also beside editors that fail after leaving gradients, hooks and flags behind."""
    editors = [nudge, {"editor": nudge, "name": "careless", "harm": "flags", "fails_after": 0}, "icl"]
    watched = run(tmp_path / "watched", [callback(tmp_path, *editors)], config, 2, *more)
    plain = run(tmp_path / "plain", [], config, 2, *more)
    same(watched, plain)
    assert scalars(watched, "train/loss") == scalars(plain, "train/loss")
    assert scalars(watched, f"val/{METRIC}") == scalars(plain, f"val/{METRIC}")
    validations = len(scalars(plain, f"val/{METRIC}"))
    for name in ("nudge", "icl"):
        assert len(set(scalars(watched, f"val/{name}/{METRIC}"))) == 1
        assert len(scalars(watched, f"val/{name}/{METRIC}")) == validations >= 2
    assert scalars(watched, "val/nudge/seconds_per_edit")[0] > 0
    assert not any("careless" in tag for tag in watched.events.Tags()["scalars"])
    assert "baselines/comparison" in watched.events.Tags()["images"]
    (text,) = watched.events.Tensors("baselines/failures/careless/text_summary")  # once in a run
    assert text.tensor_proto.string_val[0] == b"ValueError: at most 0 edits"


def test_values_are_those_of_evaluation_by_hand(tmp_path: Path, nudge: str) -> None:
    found = run(tmp_path / "run", [callback(tmp_path, nudge)])
    pools = [pool.records for pool in found.trainer.val_dataloaders.dataset]
    assert [len(pool) for pool in pools] == [5, 5]
    results = []
    with found.module.original() as backbone:
        originals = Answers(Edited(backbone))
        for place, pool in enumerate(pools):
            seed_all(baselines.stable_hash("baselines", 0, place, 0))
            results += evaluate(Nudge([1]), backbone, pool, 5, originals=originals).records
    wanted = {name: cell["value"] for name, cell in summarise(results).items()}
    assert {"generality/token_accuracy", "locality/token_agreement"} <= wanted.keys()
    for name, value in wanted.items():
        assert scalars(found, f"val/nudge/{name}")[-1] == pytest.approx(value, rel=1e-6), name
    assert wanted["locality/token_agreement"] < 1


def test_results_are_kept_across_validations_and_runs(tmp_path: Path, nudge: str) -> None:
    first = run(tmp_path / "first", [callback(tmp_path, nudge)])
    assert Nudge.calls == [5, 5]  # two pools, at the first of two validations
    second = run(tmp_path / "second", [callback(tmp_path, nudge)], "mend_tiny", 1)
    assert Nudge.calls == [5, 5]
    tags = [tag for tag in first.events.Tags()["scalars"] if tag.startswith("val/nudge")]
    assert len(tags) > 4
    assert all(scalars(first, tag)[:1] == scalars(second, tag) for tag in tags)
    others = [
        callback(tmp_path, {"editor": nudge, "name": "changed", "draw": {"scale": 2.0}}),
        callback(tmp_path, {"editor": nudge, "name": "protocol"}, exact_match=True),
        callback(tmp_path, {"editor": nudge, "name": "renamed"}),  # which changes nothing
    ]
    run(tmp_path / "others", others, "mend_tiny", 1)
    assert len(Nudge.calls) == 6
    run(tmp_path / "records", [callback(tmp_path, nudge)], "mend_tiny", 1, "--data.init_args.seed=1")
    assert len(Nudge.calls) == 8
    deeper = "--model.init_args.backbone.overrides.num_hidden_layers=5"
    run(tmp_path / "weights", [callback(tmp_path, nudge)], "mend_tiny", 1, deeper)
    assert len(Nudge.calls) == 10
    kept = json.loads(next(iter((tmp_path / "cache").glob("*.json"))).read_text())
    told = {"weights", "overrides", "records", "editor", "facts", "files", "exact_match", "code"}
    assert told <= kept["key"].keys()


def test_results_are_of_what_files_held_and_of_the_backbones_config(tmp_path: Path, nudge: str) -> None:
    texts, config = tmp_path / "texts.txt", tmp_path / "reads.yaml"
    texts.write_text("one")
    config.write_text(yaml.safe_dump({"class_path": "deltas.Reads", "init_args": {"layers": [1], "texts": str(texts)}}))
    for text, calls in (("one", 2), ("one", 2), ("two", 4)):
        texts.write_text(text)
        run(tmp_path / "run", [callback(tmp_path, str(config))], "mend_tiny", 1)
        assert len(Nudge.calls) == calls
    longer = "--model.init_args.backbone.overrides.max_position_embeddings=512"  # which no weight tells
    run(tmp_path / "longer", [callback(tmp_path, str(config))], "mend_tiny", 1, longer)
    assert len(Nudge.calls) == 6


def test_cache_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "home"))
    disk = ResultCache()
    assert disk.get({"a": 1}) is None
    disk.put({"a": 1}, {"value": 2.5})
    assert disk.get({"a": 1}) == {"value": 2.5}
    assert disk.get({"a": 2}) is None
    (file,) = (tmp_path / "home" / "results").iterdir()
    file.write_text(file.read_text().replace('"a": 1', '"a": 3'))
    assert disk.get({"a": 1}) is None  # of another key, whatever its name says
    file.write_text("{")
    with pytest.warns(UserWarning, match="cannot be read and is made anew"):
        assert disk.get({"a": 1}) is None
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="not kept for later runs"):
        ResultCache(str(tmp_path / "file")).put({"a": 1}, {})


def test_every_second_validation_or_the_first_alone(tmp_path: Path, nudge: str) -> None:
    callbacks = [
        callback(tmp_path, {"editor": nudge, "name": "second"}, every_n_validations=2),
        callback(tmp_path, {"editor": nudge, "name": "first"}, every_n_validations=0),
    ]
    found = run(tmp_path / "run", callbacks, "mend_tiny", 3)
    own, second, first = (
        [event.step for event in found.events.Scalars(f"val/{name}{METRIC}")] for name in ("", "second/", "first/")
    )
    assert len(own) == 3
    assert second == own[::2]
    assert first == own[:1]


def test_other_pools_than_the_validations_take_the_trained_editor_along(tmp_path: Path, nudge: str) -> None:
    figures = []
    with pytest.MonkeyPatch.context() as patch:
        plain = baselines.comparison
        patch.setattr(baselines, "comparison", lambda *args: figures.append(plain(*args)) or figures[-1])
        found = run(tmp_path / "run", [callback(tmp_path, nudge, pool_size=1, records=5)])
    assert Nudge.calls == [1] * 5
    (pool, _) = (pool.records for pool in found.trainer.val_dataloaders.dataset)
    with found.module.original() as backbone:
        one = evaluate(found.module.editor(), backbone, pool, 1)
    assert scalars(found, f"val/mend/{METRIC}")[-1] == pytest.approx(one.aggregates[METRIC]["value"])
    reliability = next(axes for axes in figures[-1].axes if axes.get_title() == "Reliability")
    lines = {line.get_label(): list(line.get_ydata()) for line in reliability.get_lines()}
    assert lines["mend"] == pytest.approx(scalars(found, f"val/mend/{METRIC}"))
    assert lines["nudge"] == pytest.approx(scalars(found, f"val/nudge/{METRIC}")[-1:] * 2)


def test_questions_that_the_unedited_model_cannot_know_are_left_out_of_all(tmp_path: Path, nudge: str) -> None:
    hard = Query("It rests on", ("this",), conditions=(Query("Nobody knows", ("whether xyzzy is so",)),))
    records = [
        replace(r, portability={"hard": (hard,), "easy": (Query(f"{r.id} is", ("so",)),)}) for r in val_records()
    ]
    file = tmp_path / "val.jsonl"
    file.write_text("\n".join(record.to_json() for record in records))
    source = json.dumps([{"format": "records", "path": str(file), "options": {}, "limit": None}])
    found = run(tmp_path / "run", [callback(tmp_path, nudge)], "mend_tiny", 2, f"--data.init_args.val={source}")
    tags = set(found.events.Tags()["scalars"])
    measure = "portability/{}/token_accuracy"
    assert f"val/{measure.format('hard')}" in tags  # validation asks it
    for name in ("nudge", "mend"):
        assert f"val/{name}/{measure.format('easy')}" in tags
        assert f"val/{name}/{measure.format('hard')}" not in tags
        assert len(scalars(found, f"val/{name}/{METRIC}")) == 2


def test_an_editor_that_changes_weights_for_good_ends_the_run(tmp_path: Path, nudge: str) -> None:
    bad = {"editor": nudge, "name": "bad", "harm": "weights", "fails_after": 0}
    with pytest.raises(RuntimeError, match="bad left the model's weights changed"):
        run(tmp_path / "run", [callback(tmp_path, bad)])


def test_what_is_wrong_is_refused_at_once(nudge: str) -> None:
    with pytest.raises(ValueError, match="no editor 'rum'"):
        Baselines(["rum"])
    with pytest.raises(ValueError, match="different names"):
        Baselines([nudge, nudge])
    with pytest.raises(ValueError, match="at least 1"):
        Baselines([nudge], pool_size=0)


def test_a_config_sets_it(tmp_path: Path, nudge: str) -> None:
    """As a user writes it, changes and all."""
    config = tmp_path / "more.yaml"
    editors = ["icl", {"editor": nudge, "name": "hard", "draw": {"scale": 2.0}}]
    here = {"class_path": "trainers.callbacks.Baselines", "init_args": {"editors": editors, "records": 4}}
    config.write_text(yaml.safe_dump({"trainer": {"callbacks": [here]}}))
    cli = TrainingCLI(["--config=mend_tiny", f"--config={config}", f"--run_dir={tmp_path}/run"])
    (found,) = (c for c in cli.trainer.callbacks if isinstance(c, Baselines))
    assert [e.name for e in found.editors] == ["icl", "hard"]
    assert found.editors[1].changes == {"draw": {"scale": 2.0}}


def test_as_loaded_puts_everything_back(tiny: Callable[..., Backbone]) -> None:
    model = tiny().model
    seen: list[str] = []
    model.train()
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    weight.requires_grad_(True)
    weight.grad = gradient = torch.ones_like(weight)
    handle = model.register_forward_hook(lambda *_, **__: seen.append("hook"), with_kwargs=True)

    @as_loaded(model)
    def careless() -> None:
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
        handle.remove()
        model.register_forward_hook(lambda *_: 1 / 0)
        model.forward = lambda *_: 1 / 0  # type: ignore[method-assign]
        model.requires_grad_(True)
        weight.grad = torch.zeros_like(weight)
        raise KeyError

    with pytest.raises(KeyError):
        careless()
    assert all(m.training for m in model.modules())
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["model.layers.0.mlp.down_proj.weight"]
    assert weight.grad is gradient
    model(input_ids=torch.ones(1, 2, dtype=torch.long))
    assert seen == ["hook"]


def test_as_loaded_has_no_adapters(tiny: Callable[..., Backbone]) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = tiny().model
    ids = torch.ones(1, 3, dtype=torch.long)
    before = model(input_ids=ids).logits
    inject_adapter_in_model(LoraConfig(target_modules=["down_proj"], init_lora_weights=False), model)
    adapted = model(input_ids=ids).logits
    with as_loaded(model):
        assert type(model.get_submodule("model.layers.1.mlp.down_proj")) is nn.Linear
        assert torch.equal(model(input_ids=ids).logits, before)
    assert torch.equal(model(input_ids=ids).logits, adapted)
    assert not torch.equal(before, adapted)


def test_ranks_share_the_work_and_find_what_one_process_finds(tmp_path: Path, nudge: str) -> None:
    """Under ZeRO-3 with the backbone in shards, beside an editor that fails on one of two ranks."""
    failing = {"editor": nudge, "name": "half", "fails_on_rank": 1}

    def args(name: str, spread: list[str]) -> dict[str, Any]:
        editors = json.dumps([failing, nudge])
        on = ["--trainer.callbacks=trainers.callbacks.Baselines", f"--trainer.callbacks.editors={editors}"]
        on += [f"--trainer.callbacks.cache_dir={tmp_path / name}", "--trainer.val_check_interval=2"]
        few = ["--data.init_args.val_records=10", "--data.init_args.pool_sizes=[1]", "--data.init_args.pool_rates=[1]"]
        return {"name": f"run-{name}", "args": [*spread, *few, *on], "steps": 2, "config": "mend_tiny"}

    shards = zero(3, "--trainer.strategy.init_args.partition_teacher=true")
    two = args("two", [*TWO, *shards])
    plain = two | {"name": "plain", "args": [a for a in two["args"] if "callbacks" not in a]}
    found = together(tmp_path, [two, plain])
    perform(args("one", ONE), tmp_path)
    assert found["run-two"]["losses"] == found["plain"]["losses"]
    files = [sorted((tmp_path / name).glob("*.json")) for name in ("one", "two")]
    assert [len(found) for found in files] == [2, 1]  # what failed on one rank is not kept
    (file,) = files[1]
    one, other = (json.loads((tmp_path / name / file.name).read_text()) for name in ("one", "two"))
    assert one["key"] == other["key"]
    assert other["result"]["values"] == pytest.approx(one["result"]["values"], rel=1e-6)
    assert one["result"]["records"] == 10
