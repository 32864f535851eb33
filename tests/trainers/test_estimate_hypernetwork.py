"""The dry run of MEND and IBKE: counts by hand, agreement with real memory, what is refused, and what helps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from estimate_plans import most_allocated

from trainers.cli import CONFIGS
from trainers.estimate import estimate, main, named, refuse, sized
from trainers.estimate.command import parsed
from trainers.estimate.measure import count, measure
from trainers.estimate.plan import Plan, plan_of
from trainers.estimate.remedies import DoesNotFit, enough
from trainers.estimate.totals import STEP, UTILISATION, estimate_plan

MODEL = "--model.init_args."
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 2000,
}
SHORT = [f"{MODEL}queries.max_edit_tokens=32", f"{MODEL}queries.max_query_tokens=64"]


def shaped(shape: dict[str, Any]) -> str:
    return f"{MODEL}backbone.overrides={json.dumps(shape)}"


def plan(method: str, *more: str, gpus: int = 1, card: str = "cpu") -> Plan:
    return plan_of(parsed([f"--config={method}_tiny.yaml", *more]), gpus, named(card))


def test_parameters_by_part() -> None:
    d, f, kv, rank = 64, 128, 32, 32
    mend, width = count(plan("mend")), d + f
    layer = 2 * width * rank + width  # V, U and bias; each shape is that of so many matrices, with a scale and a shift
    by_hand = sum(2 * (layer + 2 * modes * width) for modes in (6, 3))
    assert mend.parts["hypernetwork"].all == mend.parts["hypernetwork"].trained == by_hand
    assert (mend.parts["step sizes"].all, mend.trained) == (9, by_hand + 9)
    assert mend.frozen == 2 * 257 * d + 4 * (2 * d * d + 2 * d * kv + 3 * d * f + 2 * d) + d
    assert mend.frozen_name == "language model"
    assert mend.buffers == 2 * 8 * (1 + 2 * width)

    ibke = count(plan("ibke"))
    assert ibke.parts["step sizes"].all == 2
    assert ibke.frozen == mend.frozen


def test_the_language_model_keeps_its_precision() -> None:
    held = count(plan("mend", f"{MODEL}backbone.dtype=bfloat16", "--config=zero2.yaml"))
    assert held.frozen_bytes == 2 * held.frozen
    assert held.bytes == 4 * sum(held.sizes)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("mend", []),
        ("mend", [f"{MODEL}gradient_checkpointing=true", "--data.init_args.pool_sizes=[4]"]),
        ("mend", [f"{MODEL}backbone.dtype=bfloat16"]),
        ("ibke", []),
    ],
)
def test_a_step_holds_what_a_real_one_allocates(method: str, more: list[str]) -> None:
    """Torch's own profiler counts the allocations of the same batch in a real model."""
    layers = f"{MODEL}layers.layers=[1,2]"  # above the last one only the tokens that predict the answer have a gradient
    planned = plan(method, shaped(SHAPE), layers, *SHORT, *more)
    _, step = measure(planned)
    module = planned.module
    module.configure_model()
    batch = planned.family.batch(planned, module)
    parameters = list(module.deltas.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    held = sum(p.nbytes for p in parameters)

    def once() -> None:
        loss = module.losses(batch, training=True)["loss"]
        module.zero_grad()
        loss.backward()

    assert sum(step.peak.values()) == pytest.approx(most_allocated(once, held), rel=0.06)


def test_terms_are_of_each_query_or_pool() -> None:
    """Of pools of one edit, terms are gathered by row: B r (d_in + d_out) numbers of each layer, r the tokens of an
    edit. Of larger pools no row has a copy: they are N r numbers, N edits."""
    one, four = (plan("mend", *SHORT, f"--data.init_args.pool_sizes=[{size}]") for size in (1, 4))
    of_a_token = 4 * 9 * (64 + 128)
    terms = [measure(p)[1].peak["low-rank terms"] for p in (one, four)]
    assert terms[0] == pytest.approx(32 * 32 * of_a_token, rel=0.2)
    assert terms[1] == pytest.approx(16 * 32 * of_a_token, rel=0.2)


def test_the_hypernetwork_multiplies_in_32_bits() -> None:
    planned = plan("mend", shaped(SHAPE), *SHORT, f"{MODEL}backbone.dtype=bfloat16", card="h100")
    found, (_, step) = estimate_plan(planned), measure(planned)
    tokens = 16 * 31  # of edits that have a successor, more or less
    network = 3 * sum(2 * 2 * 2 * 32 * (128 + 352) for _ in range(9)) * tokens
    assert step.wide_flops > network
    assert step.flops > 2 * step.wide_flops
    assert found.tokens_per_second is not None
    assert found.tokens_per_second < UTILISATION * 989.4e12 / found.flops


def test_components(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--config=mend_tiny.yaml", "--gpus=8", "--gpu=h100", "--config=zero3.yaml"])
    said = " ".join(capsys.readouterr().out.split())
    for part in ("language model, beside it", "hypernetwork", "16 edits and 32 queries", "fits"):
        assert part in said
    found = estimate_plan(plan("mend", "--config=zero3.yaml", gpus=8, card="h100"))
    whole = count(plan("mend"))
    assert found.moments[STEP]["language model"] == 4 * (257 * 64 + (whole.frozen - 257 * 64) // 8)  # its head is whole
    assert {"weights", "gradients", "optimizer", "buffers", "gradient factors", "activations"} <= set(
        found.moments[STEP]
    )


@pytest.mark.parametrize(
    ("more", "named_in"),
    [
        (["--trainer.precision=bf16-true"], "trainer.precision bf16-true"),
        (["--trainer.precision=bf16-mixed", "--config=zero2.yaml"], "must stay in float32"),
    ],
)
def test_what_training_refuses(more: list[str], named_in: str) -> None:
    with pytest.raises(ValueError, match=named_in):
        plan("mend", *more)


def test_remedies_were_estimated() -> None:
    args = ["--config=mend_tiny.yaml", shaped(SHAPE), *SHORT, "--data.init_args.records_per_batch=2"]
    found = estimate(parsed(args), 1, sized(80))
    small = sized((found.total - 2**14) / 2**30)
    found = replace(found, plan=found.plan.altered(card=small))
    remedies = enough(found)
    with pytest.raises(DoesNotFit, match="does not fit") as refused:
        refuse(found)
    assert len(remedies) == 3
    for remedy in remedies:
        assert remedy.arguments in str(refused.value)
    again = estimate(parsed([*args, *remedies[0].arguments.split(" (")[0].split()]), 1, small)
    assert again.total == remedies[0].found.total <= small.memory


def test_a_smaller_hypernetwork_helps() -> None:
    planned = plan("mend", shaped(SHAPE), f"{MODEL}mend.rank=480", card="h100")
    changes = dict(planned.family.changes(estimate_plan(planned)))
    smaller = changes[f"{MODEL}mend.rank 120"]
    assert count(smaller).trained < count(planned).trained / 3
    assert planned.module.mend.rank == 480
    assert f"{MODEL}loss.chunk 256" in changes


@pytest.mark.parametrize(
    "path", sorted([*CONFIGS.glob("mend_*.yaml"), *CONFIGS.glob("ibke_*.yaml")]), ids=lambda p: p.name
)
def test_shipped_configs(path: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    args = [f"--config={path}", f"{MODEL}backbone.source=random:llama", shaped(shape), f"{MODEL}layers.layers=[0,1]"]
    found = estimate(parsed(args), 8, named("h100"))
    assert found.fits
    assert {"weights", "optimizer", "activations", "language model"} <= found.moments[STEP].keys()
