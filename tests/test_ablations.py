"""The ablations of InComeS's table 6: each, laid over a run's config, changes one thing, and trains without it."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.trained.incomes import InComeS
from trainers.cli import CONFIGS, TrainingCLI

HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.precision=32-true"]
CHANGES: dict[str, dict[str, Any]] = {
    "full_model": {"gist.layers": "all"},
    "golden_loss": {"loss.golden_weight": 0.05, "optimizer.selection_lr": None},
    "no_zero_gist": {"gist.zero_gist": False},
    "no_kl": {"loss.kl_weight": 0.0},
    "no_weighting": {"loss.weighted": False},
    "no_query_loss": {"loss.ce_on": "answer", "loss.kl_on": "answer"},
    "query_loss": {"loss.ce_on": "all", "loss.kl_on": "all"},
}


def parsed(tmp_path: Path, base: str, ablation: str = "") -> InComeS:
    over = [f"--config=ablation_{ablation}.yaml"] if ablation else []
    cli = TrainingCLI([f"--config={base}.yaml", *over, *HERE, f"--run_dir={tmp_path}"])
    assert isinstance(cli.model, InComeS)
    return cli.model


def switches(module: InComeS) -> dict[str, Any]:
    parts = {"gist": module.gist_config, "loss": module.loss, "optimizer": module.optimizer_config}
    found = {f"{part}.{name}": v for part, config in parts.items() for name, v in asdict(config).items()}
    return found | {"train": module.train_part, "reader": module.reader, "queries": asdict(module.queries)}


def test_there_is_a_file_for_each() -> None:
    assert {p.stem.removeprefix("ablation_") for p in CONFIGS.glob("ablation_*.yaml")} == set(CHANGES)


@pytest.mark.parametrize("base", ["incomes_llama1b", "incomes_smollm2"])
def test_an_ablation_changes_what_it_says_and_nothing_else(tmp_path: Path, base: str) -> None:
    plain = switches(parsed(tmp_path, base))
    for ablation, change in CHANGES.items():
        assert switches(parsed(tmp_path, base, ablation)) == plain | change, ablation
        same = all(plain[key] == value for key, value in change.items())
        # the only one that a shipped run is already; its header says so
        assert same == (base == "incomes_smollm2" and ablation == "no_query_loss"), ablation


Losses = tuple[InComeS, Any, dict[str, torch.Tensor]]


@pytest.fixture
def losses(tmp_path: Path, records: list[EditRecord]) -> Callable[[str], Losses]:
    """A module on incomes_tiny with an ablation, a batch, and its losses."""

    def make(ablation: str) -> Losses:
        module = parsed(tmp_path, "incomes_tiny", ablation)
        torch.manual_seed(0)
        module.configure_model()
        module.gists.train()
        with torch.no_grad():  # away from the start, where student and teacher agree
            for p in module.gists.parameters():
                p += 0.02 * torch.randn_like(p)
        batch = module.collator()([Slot(r, 0, 50 + i) for i, r in enumerate(records)])
        return module, batch, module.losses(batch, batch.visible)

    return make


def test_full_model_writes_and_reads_in_every_layer_that_knows_the_choice(losses: Callable[[str], Losses]) -> None:
    module, batch, _ = losses("full_model")
    model = module.gists
    assert model.match_layer == model.active.start == 0  # a fifth of four layers
    assert sorted(model.compress(batch.edits, batch.edits_mask).layers) == [0, 1, 2, 3]


def test_golden_loss_moves_selection(losses: Callable[[str], Losses]) -> None:
    module, _, parts = losses("golden_loss")
    rest = parts["weighted_ce"] + parts["kl"]
    torch.testing.assert_close(parts["loss"], rest + 0.05 * (parts["golden"] + parts["zero"]))
    (parts["golden"] + parts["zero"]).backward()
    assert module.gists.matcher is not None
    assert module.gists.matcher.map.grad is not None
    assert module.gists.matcher.map.grad.abs().max() > 0


def test_no_zero_gist_leaves_nothing_to_nothing(losses: Callable[[str], Losses]) -> None:
    module, batch, parts = losses("no_zero_gist")
    trace: dict[int, torch.Tensor] = {}
    pool = module.gists.compress(batch.edits, batch.edits_mask)
    with torch.no_grad():
        module.gists(batch.queries, batch.queries_mask, pool, batch.visible, trace=trace)
    assert trace
    assert all(float(t[..., -1].detach().exp().max()) == 0 for t in trace.values())
    assert torch.isfinite(parts["loss"])


def test_no_kl_is_not_in_the_loss(losses: Callable[[str], Losses]) -> None:
    module, _, parts = losses("no_kl")
    assert parts["kl"] > 0
    golden = module.loss.golden_weight * (parts["golden"] + parts["zero"])  # incomes_tiny has that too
    torch.testing.assert_close(parts["loss"], parts["weighted_ce"] + golden)


def test_no_weighting_counts_every_token_alike(losses: Callable[[str], Losses]) -> None:
    (module, batch, parts), (weighted, _, others) = losses("no_weighting"), losses("golden_loss")
    assert (module.loss.weighted, weighted.loss.weighted) == (False, True)
    pool = module.gists.compress(batch.edits, batch.edits_mask)
    states = module.gists(batch.queries, batch.queries_mask, pool, batch.visible)[0].last_hidden_state
    head = module.gists.reader.model.get_output_embeddings()
    assert head is not None
    logp = head(states).log_softmax(-1)
    rows = []
    for b in range(len(batch)):
        at = [i for i in range(1, batch.queries.shape[1]) if batch.answer[b, i]]
        ce = torch.stack([-logp[b, i - 1, batch.queries[b, i]] for i in at]).mean()
        rows.append(ce if batch.golden[b] >= 0 else 0 * ce)
    torch.testing.assert_close(parts["weighted_ce"], torch.stack(rows).mean(), atol=1e-5, rtol=1e-4)
    assert not torch.isclose(parts["weighted_ce"], others["weighted_ce"])


def test_no_query_loss_does_not_hear_of_queries(losses: Callable[[str], Losses]) -> None:
    found = {name: losses(name)[2] for name in ("no_query_loss", "query_loss", "no_kl")}  # the last: KL on all tokens
    assert not torch.isclose(found["no_query_loss"]["kl"], found["query_loss"]["kl"])
    torch.testing.assert_close(found["query_loss"]["kl"], found["no_kl"]["kl"])
    torch.testing.assert_close(found["no_query_loss"]["weighted_ce"], found["no_kl"]["weighted_ce"])
    assert not torch.isclose(found["no_query_loss"]["weighted_ce"], found["query_loss"]["weighted_ce"])
