"""InComeS's settings, what its checkpoints hold, and what its workers send."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from incomes_plain import TRAIN, batch_of, begin_with_bos
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig
from modules.gist.batch import GistBatch
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LossConfig, OptimizerConfig


def test_optimizer_share() -> None:
    config = OptimizerConfig(lr=1.0, warmup_steps=4, min_lr_share=0.1)
    shares = [config.share(s, 24) for s in range(30)]
    assert shares[:4] == [0.25, 0.5, 0.75, 1.0]
    assert shares[4] == 1.0
    assert shares[14] == pytest.approx(0.55)
    assert shares[24:] == [pytest.approx(0.1)] * 6
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        OptimizerConfig(lr=-1.0)


def test_configs_are_checked() -> None:
    for name in ("ce_weight", "kl_weight", "golden_weight", "weight_scale"):
        with pytest.raises(ValueError, match=name):
            LossConfig(**{name: -0.1})
    for wrong in ({"temperature": 0.0}, {"scale": -1.0}, {"match_layer": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            GistConfig(**wrong)  # type: ignore[arg-type]


def checked(precision: str = "32-true", zero: bool = False, dtype: str = "float32", **options: Any) -> None:
    strategy = SimpleNamespace(hold=None) if zero else SimpleNamespace()
    module = InComeS(BackboneConfig("random:llama", dtype=dtype), **options)
    module.check(SimpleNamespace(precision=precision, strategy=strategy))  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_weights_of_16_bits_are_trained_only_where_something_keeps_them_in_float32(precision: str) -> None:
    for train in ("full", "upper"):
        checked(precision, train=train)
        checked(precision, zero=True, dtype="bfloat16", train=train)
        with pytest.raises(ValueError, match=rf"model\.backbone\.dtype bfloat16 with model\.train {train}"):
            checked(precision, dtype="bfloat16", train=train)
    checked(precision, dtype="bfloat16", train="lora")


def test_a_mean_query_needs_records_to_be_the_mean_of() -> None:
    gist = GistConfig(zero_key="mean_query")
    with pytest.raises(ValueError, match=r"gist\.zero_key mean_query .* model\.calibration_records is 0"):
        checked(gist=gist)
    checked(gist=gist, calibration_records=8)
    checked(gist=GistConfig(selection="hidden", zero_key="mean_query"))  # which has no such key


def test_precisions_that_round_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.precision bf16-true .* take bf16-mixed$"):
        checked("bf16-true")


@pytest.mark.parametrize("train", TRAIN)
def test_checkpoint_holds_what_is_trained_and_no_more(build: Callable[..., InComeS], train: str) -> None:
    module = build(train=train, gist=GistConfig(selection="both"))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    names = set(checkpoint["state_dict"])
    assert names == {n for n, p in module.named_parameters() if p.requires_grad} | {"model.matcher.mean"}
    other = build(train=train, gist=GistConfig(selection="both"))
    other.on_load_checkpoint(checkpoint)
    for wrong in (
        dict(list(checkpoint["state_dict"].items())[1:]),
        checkpoint["state_dict"] | {"model.x": torch.ones(1)},
    ):
        with pytest.raises(ValueError, match="does not fit"):
            other.on_load_checkpoint({"state_dict": wrong})


@pytest.mark.parametrize("now", [True, False])
@pytest.mark.parametrize("then", [True, False, None])
def test_a_run_goes_on_with_the_bos_that_it_began_with(
    build: Callable[..., InComeS], then: bool | None, now: bool
) -> None:
    module = build(gist=GistConfig(bos=bool(then)))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    if then is None:
        del checkpoint["gist_bos"]  # of before the setting was there: queries had none
    other = build(gist=GistConfig(bos=now))
    other.on_load_checkpoint(checkpoint)  # where the tokenizer adds none it says nothing
    begin_with_bos(other)
    refused = pytest.raises(ValueError, match=r"gist\.bos (true|false), the config says .*config\.yaml")
    with nullcontext() if bool(then) == now else refused as error:
        other.on_load_checkpoint(checkpoint)
    assert (error is None) == (bool(then) == now)


def test_batches_survive_pickling(build: Callable[..., InComeS], records: list[EditRecord]) -> None:
    import pickle  # a loader's workers send batches, and are sent the collator

    module = build()
    again = pickle.loads(pickle.dumps(module.collator()))
    batch, other = batch_of(module, records), again([Slot(r, 0, 50 + i) for i, r in enumerate(records)])
    for f in fields(GistBatch):
        a, b = getattr(batch, f.name), getattr(copy.deepcopy(other), f.name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
