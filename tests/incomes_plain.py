"""InComeS's losses in plain arithmetic on full logits, and what they are compared on."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.gist.batch import GistBatch
from modules.trained.incomes import InComeS

TRAIN = ("full", "upper", "lora")


def batch_of(module: InComeS, records: list[EditRecord], pools: list[int] | None = None) -> GistBatch:
    slots = [Slot(r, p, 50 + i) for i, (r, p) in enumerate(zip(records, pools or [0] * len(records), strict=True))]
    return module.collator()(slots)


def begin_with_bos(module: InComeS) -> None:
    module.tokenizer.bos_token = "<|endoftext|>"
    module.tokenizer._palimpsest_adds_bos = True


def teacher_of(build: Callable[..., InComeS], options: dict[str, Any]) -> torch.nn.Module:
    """The model that training began with, loaded afresh and never touched."""
    from modules.backbone import load_backbone

    return load_backbone(build(**options).backbone_config).model


def plain_losses(module: InComeS, original: torch.nn.Module, batch: GistBatch) -> dict[str, Tensor]:
    """Row by row, token by token, with whole logits."""
    config, model = module.loss, module.gists
    newline = module.tokenizer("\n")["input_ids"]
    pool = model.compress(batch.edits, batch.edits_mask)
    ce_rows, kl_rows, golden_rows, zero_rows, teacher_rows = [], [], [], [], []
    for b in range(len(batch)):
        length = int(batch.queries_mask[b].sum())
        ids = batch.queries[b, :length]
        head = int(ids[0] == module.tokenizer.bos_token_id)
        golden = int(batch.golden[b])
        with torch.no_grad():
            alone = original(ids[None]).logits[0].log_softmax(-1)
            taught = alone
            if golden >= 0:
                edit = batch.edits[golden][batch.edits_mask[golden].bool()].tolist()
                row = torch.tensor([[*edit, *newline, *ids[head:].tolist()]])
                taught = original(row).logits[0].log_softmax(-1)[len(edit) + len(newline) - head :]
        trace: dict[int, Tensor] = {}
        out, _ = model(ids[None], torch.ones(1, length).long(), pool, batch.visible[b : b + 1], trace=trace)
        student = model.reader.model.get_output_embeddings()(out.last_hidden_state[0]).log_softmax(-1)
        ce, count, kl, missed, told = torch.zeros(()), 0, [], [], []
        for i in range(1 + head, length):
            token, answer = ids[i], bool(batch.answer[b, i])
            if golden >= 0 and (answer or config.ce_on == "all"):
                weight = torch.relu(taught[i - 1, token] - alone[i - 1, token]) * config.weight_scale
                weight = weight if config.weighted else torch.ones(())
                if weight != 0:
                    ce, count = ce - weight * student[i - 1, token], count + 1
            if answer or config.kl_on == "all":
                kl.append(F.kl_div(student[i - 1], taught[i - 1], log_target=True, reduction="sum"))
            if answer:
                told.append(-taught[i - 1, token])
                missed.append(-torch.stack([t[0, i - 1, golden] for t in trace.values()]).mean())
        ce_rows.append(ce / max(count, 1))
        kl_rows.append(torch.stack(kl).mean())
        if golden >= 0:
            teacher_rows.append(torch.stack(told).mean())
        (golden_rows if golden >= 0 else zero_rows).append(torch.stack(missed).mean())
    n = len(batch)
    parts = {"weighted_ce": sum(ce_rows) / n, "kl": sum(kl_rows) / n}
    loss = config.ce_weight * parts["weighted_ce"] + config.kl_weight * parts["kl"]
    if config.weighted:
        parts["teacher_ce"] = sum(teacher_rows) / max(len(teacher_rows), 1)
    if config.golden_weight:
        parts |= {"golden": sum(golden_rows) / n, "zero": sum(zero_rows) / n}
        loss = loss + config.golden_weight * (parts["golden"] + parts["zero"])
    return {"loss": loss, **parts}  # type: ignore[dict-item]


def gradients(module: InComeS, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def same_gradients(module: InComeS, expected: Tensor, found: Tensor) -> None:
    wanted, got = gradients(module, expected), gradients(module, found)
    assert wanted.keys() == got.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}")
