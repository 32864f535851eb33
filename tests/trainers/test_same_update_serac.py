"""SERAC's classifier and counterfactual model are the same however a job is spread: the tiny config, 8 steps."""

from typing import Any

import pytest
import torch
from ranks import ONE, TWO, perform, together, zero

from trainers.cli import parse

STEPS = 8
# where an element's gradients are no larger than Adam's usual 1e-8, the rounding of their sums decides its step
EPS = "--model.init_args.optimizer.eps=1e-6"
POOLS = ["--data.init_args.pool_rates=[2, 1, 1]", "--model.init_args.queries.pairs=pool"]  # of 2, 4 and 8 edits
SINGLE = ["--data.init_args.pool_sizes=[1]", "--data.init_args.pool_rates=[1]"]
MIXTURE = [*SINGLE, "--model.init_args.supervised=false"]
# the backbone in shards, layers that are run again, validations between
SHARDS = zero(3, "--trainer.strategy.init_args.partition_teacher=true")
HARDER = ["--trainer.val_check_interval=4", "--model.init_args.gradient_checkpointing=true"]
SPREADS: dict[str, list[str]] = {
    "ddp": [*TWO, "--trainer.strategy=ddp", *SINGLE],
    "zero2": [*TWO, *zero(2), *SINGLE],
    "zero2-pools": [*TWO, *zero(2), *POOLS],
    "zero3": [*TWO, *SHARDS, *HARDER, *SINGLE],
    "zero3-mixture": [*TWO, *SHARDS, *MIXTURE],
}
# what is added to all vectors alike changes no distance: its gradient is nothing but rounding
SHIFT = "model.scope.encoder.model.encoder.layer.1.output.LayerNorm.bias"
pytestmark = pytest.mark.filterwarnings("ignore")


def task(name: str, args: list[str]) -> dict[str, Any]:
    return {"name": name, "args": [*args, EPS], "steps": STEPS, "config": "serac_tiny"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    found = together(folder, [task(name, args) for name, args in SPREADS.items()])
    alone = {"one": [*ONE, *SINGLE], "one-pools": [*ONE, *POOLS], "one-mixture": [*ONE, *MIXTURE]}
    return found | {name: perform(task(name, args), folder) for name, args in alone.items()}


@pytest.mark.parametrize("spread", list(SPREADS))
def test_losses_and_parameters_are_those_of_one_process(runs: dict[str, Any], spread: str) -> None:
    one = runs["-".join(["one", *spread.split("-")[1:]])]
    two = runs[spread]
    halves = one["losses"]
    assert len(two["losses"]) == STEPS
    expected = [(a + b) / 2 for a, b in zip(halves[::2], halves[1::2], strict=True)]
    assert two["losses"] == pytest.approx(expected, rel=1e-5)
    assert two["params"].keys() == one["params"].keys()
    assert not any("backbone" in name for name in one["params"])
    assert SHIFT in one["params"]
    for name, tensor in one["params"].items():
        if name == SHIFT:
            continue
        torch.testing.assert_close(two["params"][name], tensor, rtol=1e-6, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_training_moved_what_it_trains(runs: dict[str, Any]) -> None:
    """The comparison above would hold for runs that do nothing."""
    module: Any = parse(["--config=serac_tiny"]).model
    start = dict(module.serac.named_parameters(prefix="model"))
    one = runs["one"]["params"]
    assert start.keys() == one.keys()
    for name, tensor in one.items():
        if not name.endswith(".key.bias"):  # which moves all of a query's scores alike
            assert (tensor - start[name]).abs().max() > 1e-4, name
    assert len({tuple(runs[name]["losses"]) for name in ("one", "one-pools", "one-mixture")}) == 3


def test_ranks_see_disjoint_records_of_equal_number(runs: dict[str, Any]) -> None:
    first, second = runs["zero2"]["records"]
    assert [len(step) for step in first] == [len(step) for step in second] == [8] * STEPS
    assert not any(set(a) & set(b) for a, b in zip(first, second, strict=True))
