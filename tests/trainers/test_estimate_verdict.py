"""The dry run: cards, speed, what fits, what would make it fit, and what is refused."""

from typing import Any

import pytest
from estimate_plans import MODEL, random_source, wide

from trainers.estimate import cards, estimate, main, named, sized
from trainers.estimate.command import parsed
from trainers.estimate.plan import plan_of
from trainers.estimate.state import CONTEXT
from trainers.estimate.totals import LOADING, STEP, UPDATE, UTILISATION, VALIDATION, estimate_plan


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
    sixteen = [f"{MODEL}backbone.dtype=bfloat16", "--config=zero2.yaml"]
    published = [f"{MODEL}gist.selection=qk", f"{MODEL}loss.golden_weight=0"]
    cli = parsed(wide(*sixteen, *published, "--trainer.max_steps=100"))
    known = estimate(cli, 2, named("h100"))
    assert known.tokens_per_second is not None
    assert known.tokens_per_second == pytest.approx(2 * UTILISATION * 989.4e12 / known.flops, rel=0.01)
    assert known.hours == pytest.approx(100 * known.tokens / known.tokens_per_second / 3600)
    assert known.tokens == 2 * 16 * (128 + 254)
    # whose teacher is of 32 bits, at 66.9 TFLOP/s
    whole = estimate(parsed(wide(*sixteen, *published, f"{MODEL}teacher_dtype=float32")), 2, named("h100"))
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
    given = wide(f"{MODEL}backbone.dtype=bfloat16", "--config=zero2.yaml", "--data.init_args.records_per_batch=64")
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
        (["--gpu=h100", "--trainer.devices=-1"], "trainer.devices is '-1': say how many with --gpus"),
        (["--gpus=1", "--trainer.accelerator=gpu"], "--gpu NAME"),
        (["--gpus=1", "--gpu=h100", "--trainer.strategy=fsdp"], "trainer.strategy fsdp"),
        (["--gpus=1", "--gpu=h100", f"{MODEL}backbone.source=./nowhere"], "backbone './nowhere'"),
    ],
)
def test_what_is_wrong_is_named(args: list[str], named_in: str) -> None:
    message, code = command("--config=incomes_tiny.yaml", *args)
    assert code not in (0, None)
    assert named_in in message
