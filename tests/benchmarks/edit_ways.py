"""The ways to train many edits that bench_edits.py compares, and the module and edits that they are tried on."""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.func import functional_call

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from datamodules.sources import load
from modules.gradients import Factors
from modules.hypernetwork.batch import EditBatch
from modules.hypernetwork.module import GradientEditor
from modules.interventions import LowRank, hooked, linear, low_rank
from trainers.estimate.command import parsed

CONFIGS = {
    "smollm2": {"mend": "mend_smollm2.yaml", "ibke": "ibke_smollm2_zsre_counterfact.yaml"},
    "random": {"mend": "mend_tiny.yaml", "ibke": "ibke_tiny.yaml"},
}
FACTS = {"format": "facts", "path": None, "options": {"split": "train"}, "limit": 2000}
RANDOM = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}


@dataclass
class Run:
    """A module that trains, and records for it."""

    module: GradientEditor
    optimizer: torch.optim.Optimizer
    records: list[EditRecord]


@dataclass
class Subject:
    """A run with the batch of its next step, and the same batch edit by edit."""

    run: Run
    batch: EditBatch
    single: list[EditBatch]

    @property
    def module(self) -> GradientEditor:
        return self.run.module


def build(given: argparse.Namespace) -> Run:
    """The module of a shipped config, calibrated, and moved from its start, where most gradients are zero."""
    model = "--model.init_args.backbone."
    more = [] if given.model == "smollm2" else [f"{model}overrides={json.dumps(RANDOM)}"]
    config = CONFIGS[given.model][given.method]
    cli = parsed(
        [f"--config={config}", f"--data.init_args.train={json.dumps([FACTS])}", f"{model}dtype={given.dtype}", *more]
    )
    module: Any = cli.model
    module.configure_model()
    module.deltas.backbone.model.to(given.device)
    module.to(given.device)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.deltas.network.parameters():
            if not any(p is rate for rate in module.deltas.network.rates()):
                p += 1e-3 * torch.randn(p.shape, generator=draw).to(p)
    data: Any = cli.datamodule
    found = load(data.train, data.cache_dir)
    count = min(len(found), max(64, 2 * max(given.edits)))
    fits = module.collator().fits
    records = [r for r in found.records(random.Random(0).sample(range(len(found)), count)) if fits(r)]
    module.calibrate(records[:32])
    return Run(module, module.configure_optimizers()["optimizer"], records)


def subject(run: Run, edits: int) -> Subject:
    slots = [Slot(record, i, i) for i, record in enumerate(run.records[:edits])]
    batch = run.module.collator()(slots).to(run.module.deltas.backbone.device)
    return Subject(run, batch, [alone(batch, pool) for pool in range(batch.pools)])


def alone(batch: EditBatch, pool: int) -> EditBatch:
    """One pool of a batch, without the padding that the others need."""

    def cut(chosen: Tensor, *tensors: Tensor) -> list[Tensor]:
        width = int(tensors[1][chosen].sum(1).max())
        return [t[chosen, :width].contiguous() for t in tensors]

    mine, asked = batch.edit_pool == pool, batch.query_pool == pool
    edits, edits_mask, edits_answer = cut(mine, batch.edits, batch.edits_mask, batch.edits_answer)
    queries, queries_mask, queries_answer = cut(asked, batch.queries, batch.queries_mask, batch.queries_answer)
    return replace(
        batch,
        edits=edits,
        edits_mask=edits_mask,
        edits_answer=edits_answer,
        edit_pool=batch.edit_pool[mine] * 0,
        edit_seed=batch.edit_seed[mine],
        queries=queries,
        queries_mask=queries_mask,
        queries_answer=queries_answer,
        query_pool=batch.query_pool[asked] * 0,
        in_scope=batch.in_scope[asked],
        pools=1,
    )


def parallel(subject: Subject) -> None:
    subject.module.losses(subject.batch, training=True)["loss"].backward()


def parallel_materialised(subject: Subject) -> None:
    rows = len(subject.batch.queries) // subject.batch.pools  # of each edit, one after another
    if not torch.equal(subject.batch.query_pool.cpu(), torch.arange(subject.batch.pools).repeat_interleave(rows)):
        raise ValueError("each edit needs as many queries as the others: choose other records")

    @contextmanager
    def whole(model: nn.Module, terms: Mapping[str, LowRank]) -> Iterator[None]:
        changes = {name: LowRank(term.a[::rows], term.b[::rows]).weight() for name, term in terms.items()}

        def adding(change: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:  # [N, d_in, d_out]
            def add(_: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                x = inputs[0].to(change.dtype).reshape(len(change), -1, change.shape[1])
                return (output + (x @ change).view(output.shape)).to(output.dtype)

            return add

        with hooked(model, {name: adding(change) for name, change in changes.items()}):
            yield

    with patch(f"{GradientEditor.__module__}.{low_rank.__name__}", whole):
        parallel(subject)


def loop(subject: Subject) -> None:
    for batch in subject.single:
        (edited_loss(subject.module, batch) / len(subject.single)).backward()


def edited_loss(module: GradientEditor, batch: EditBatch) -> Tensor:
    """The loss of one edit, whose change of weights is added to them."""
    config, model = module.loss, module.deltas.backbone.model
    decoder, head = model.base_model, model.get_output_embeddings()
    factors = factors_of(module, batch)
    module.deltas.network.observe(factors)
    deltas, penalties = module.deltas.network(factors, batch.edit_seed)
    names = {part: name for name, part in decoder.named_modules()}
    weights = {}
    for name, delta in deltas.items():
        layer, change = linear(model, name), delta.a.T @ delta.b  # [d_in, d_out]
        change = change.T if isinstance(layer, nn.Linear) else change
        weights[f"{names[layer]}.weight"] = (layer.weight + change).to(layer.weight.dtype)
    ids, mask = batch.queries, batch.queries_mask
    given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    hidden = functional_call(decoder, weights, kwargs=given).last_hidden_state
    outside = ~batch.in_scope
    with torch.no_grad():
        unedited = hidden.clone()
        if outside.any():
            before = decoder(input_ids=ids[outside], attention_mask=mask[outside], use_cache=False)
            unedited[outside] = before.last_hidden_state
    loss = sum((penalty.sum() for penalty in penalties.values()), torch.zeros((), device=ids.device))
    for row, inside in enumerate(batch.in_scope.tolist()):
        on_answer = inside or config.locality_on == "answer"
        at = (batch.queries_answer if on_answer else mask)[row, 1:].nonzero()[:, 0]
        after = head(hidden[row, at]).float().log_softmax(-1)  # [n, V]
        if inside:
            nll = -after[torch.arange(len(at)), ids[row, at + 1]]
            loss = loss + config.edit_weight / module.queries.generality * nll.mean()
        else:
            with torch.no_grad():
                before = head(unedited[row, at]).float().log_softmax(-1)
            p, q = (before, after) if config.locality_direction == "forward" else (after, before)
            kl = (p.exp() * (p - q)).sum(-1)
            loss = loss + config.locality_weight / module.queries.locality * kl.mean()
    return loss


def factors_of(module: GradientEditor, batch: EditBatch) -> dict[str, Factors]:
    """The factors of one edit's weight gradients, which are made too."""
    model = module.deltas.backbone.model
    layers = {name: linear(model, name) for name in module.deltas.names}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = given[0].detach(), output

    hooks = [
        layer.register_forward_hook(lambda _, given, output, name=name: keep(name, given, output))
        for name, layer in layers.items()
    ]
    weights = [layer.weight.requires_grad_() for layer in layers.values()]
    try:
        hidden = model.base_model(input_ids=batch.edits, attention_mask=batch.edits_mask, use_cache=False)
        at = batch.edits_answer[0, 1:].nonzero()[:, 0]
        after = model.get_output_embeddings()(hidden.last_hidden_state[0, at]).float().log_softmax(-1)
        loss = -after[torch.arange(len(at)), batch.edits[0, at + 1]].mean()
        found = torch.autograd.grad(loss, [*outputs.values(), *weights])
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights:
            weight.requires_grad_(False)
    return {
        name: Factors(inputs[name].float(), u.float(), (u != 0).any(-1) & (inputs[name] != 0).any(-1))
        for name, u in zip(outputs, found, strict=False)
    }


WAYS: dict[str, Callable[[Subject], None]] = {
    "parallel": parallel,
    "loop": loop,
    "parallel, materialised": parallel_materialised,
}


def step(way: str, subject: Subject) -> None:
    """One optimizer step."""
    subject.run.optimizer.zero_grad()
    WAYS[way](subject)
    subject.module.deltas.network.commit()
    subject.run.optimizer.step()
