"""The dry run: what a step holds and how much it computes, in agreement with real memory."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from estimate_plans import MODEL, WIDE, most_allocated, random_source, tiny_plan, wide

from trainers.estimate import named
from trainers.estimate.command import parsed
from trainers.estimate.measure import measure
from trainers.estimate.plan import plan_of
from trainers.estimate.weightless import Weightless


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

    def once() -> None:
        with torch.autocast("cpu", plan.autocast or torch.bfloat16, enabled=plan.autocast is not None):
            loss = module.losses(batch, batch.visible)["loss"]
        module.zero_grad()
        loss.backward()

    assert sum(step.peak.values()) == pytest.approx(most_allocated(once, held), rel=0.06)


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
