"""InComeS in training: its losses against plain arithmetic on full logits, and what is trained by them."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig
from modules.editor import Edited
from modules.gist.batch import GistBatch, QueryConfig
from modules.gist.model import GistConfig
from modules.trained.incomes import InComeS
from modules.trained.incomes_config import LoraOptions, LossConfig, OptimizerConfig

TRAIN = ("full", "upper", "lora")


@pytest.fixture
def build(tiny_config: Callable[..., BackboneConfig]) -> Callable[..., InComeS]:
    def make(kind: str = "llama", **options: Any) -> InComeS:
        torch.manual_seed(0)
        options.setdefault("queries", QueryConfig(per_record=3))
        if options.get("train") == "lora":
            options.setdefault("lora", LoraOptions(4, 8, ["q_proj", "k_proj", "v_proj", "down_proj"]))
        module = InComeS(tiny_config(kind, tie_word_embeddings=True), **options)
        module.configure_model()
        module.gists.train()
        with torch.no_grad():  # away from the start, where student and teacher agree
            for p in module.gists.parameters():
                if p.requires_grad:
                    p += 0.02 * torch.randn_like(p)
        return module

    return make


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


@pytest.mark.parametrize("reader", ["student", "original"])
@pytest.mark.parametrize("train", TRAIN)
@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_losses_and_gradients_against_plain_arithmetic(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, reader: str, selection: str
) -> None:
    options: dict[str, Any] = {
        "train": train,
        "reader": reader,
        "gist": GistConfig(selection=selection, scale=3.0),  # type: ignore[arg-type]
        "loss": LossConfig(golden_weight=0.5, ce_weight=0.7, weight_scale=0.5, chunk=5),
    }
    module = build(**options)
    original = teacher_of(build, options)
    batch = batch_of(module, records, [0, 0, 0, 1])
    assert (batch.golden < 0).any()
    assert (batch.golden >= 0).any()
    expected = plain_losses(module, original, batch)
    found = module.losses(batch, batch.visible)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    same_gradients(module, expected["loss"], found["loss"])


@pytest.mark.parametrize("ce_on", ["answer", "all"])
@pytest.mark.parametrize("kl_on", ["answer", "all"])
@pytest.mark.parametrize("weighted", [True, False])
def test_loss_switches(build: Callable[..., InComeS], records: list[EditRecord], ce_on, kl_on, weighted) -> None:
    options = {"train": "upper", "loss": LossConfig(ce_on=ce_on, kl_on=kl_on, weighted=weighted)}
    module = build(**options)
    batch = batch_of(module, records)
    expected = plain_losses(module, teacher_of(build, options), batch)
    found = module.losses(batch, batch.visible)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("train", TRAIN)
def test_losses_with_a_tokenizer_that_adds_a_bos(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, bos: bool
) -> None:
    options: dict[str, Any] = {"train": train, "gist": GistConfig(bos=bos), "loss": LossConfig(golden_weight=0.5)}
    module = build(**options)
    begin_with_bos(module)
    batch = batch_of(module, records)
    assert bool((batch.queries[:, 0] == module.tokenizer.bos_token_id).all()) == bos
    expected = plain_losses(module, teacher_of(build, options), batch)
    for name, value in module.losses(batch, batch.visible).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "gpt2", "gpt_neox", "gptj"])
def test_losses_of_other_architectures(build: Callable[..., InComeS], records: list[EditRecord], kind: str) -> None:
    """Packed rows, positions and masks reach each architecture; GPT-2's dropout is in the student alone."""
    options = {"kind": kind, "train": "upper", "loss": LossConfig(golden_weight=0.5)}
    module = build(**options)
    module.gists.eval()
    original = teacher_of(build, options)
    batch = batch_of(module, records)
    expected = plain_losses(module, original, batch)
    for name, value in module.losses(batch, batch.visible).items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


def test_without_weights_and_distillation_no_teacher_is_asked(
    build: Callable[..., InComeS], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = build(loss=LossConfig(weighted=False, kl_weight=0.0, chunk=5))
    batch = batch_of(module, records, [0, 0, 0, 1])
    expected = plain_losses(module, module.teacher, batch)
    monkeypatch.setattr(module, "_teach", None)
    found = module.losses(batch, batch.visible)
    assert found.keys() == {"loss", "weighted_ce"}
    torch.testing.assert_close(found["loss"], expected["weighted_ce"], atol=1e-5, rtol=1e-4)
    same_gradients(module, expected["weighted_ce"], found["loss"])


def test_out_of_scope_rows_have_no_cross_entropy(build: Callable[..., InComeS], records: list[EditRecord]) -> None:
    for weighted in (True, False):
        module = build(
            queries=QueryConfig(rates={"locality": 1.0}),
            loss=LossConfig(weighted=weighted, golden_weight=1.0, ce_on="all"),
        )
        batch = batch_of(module, records)
        parts = module.losses(batch, batch.visible)
        assert parts["weighted_ce"] == 0
        assert parts["golden"] == 0
        assert parts["kl"] > 0
        assert parts["zero"] > 0
        assert all(torch.isfinite(g).all() for g in gradients(module, parts["loss"]).values())


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_splitting_a_batch_changes_nothing(build: Callable[..., InComeS], records: list[EditRecord], selection) -> None:
    """Two pools in a micro-batch, or a micro-batch each: the same loss and the same update."""
    module = build(gist=GistConfig(selection=selection), loss=LossConfig(golden_weight=0.5))
    batch = batch_of(module, records, [0, 0, 1, 1])
    whole = module.losses(batch, batch.visible)
    grads = gradients(module, whole["loss"])
    halves = [
        module.collator()([Slot(r, 0, 50 + i) for i, r in enumerate(records) if i // 2 == half]) for half in range(2)
    ]
    losses = [module.losses(b, b.visible) for b in halves]
    for name, value in whole.items():
        if name == "teacher_ce":  # a mean over queries in scope, of which the halves have more or fewer
            continue
        torch.testing.assert_close((losses[0][name] + losses[1][name]) / 2, value, atol=1e-6, rtol=1e-5)
    split = gradients(module, (losses[0]["loss"] + losses[1]["loss"]) / 2)
    for name, grad in grads.items():
        torch.testing.assert_close(split[name], grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("reader", ["student", "original"])
@pytest.mark.parametrize("train", TRAIN)
def test_what_is_trained_and_what_is_not(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, reader: str
) -> None:
    module = build(train=train, reader=reader, loss=LossConfig(golden_weight=0.5))
    batch = batch_of(module, records)
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    for name in trained:
        inside = name.removeprefix("model.")
        if inside.startswith("language_model."):
            if train == "lora":
                assert "lora_" in inside
            elif train == "upper":
                assert ".layers.2." in inside or ".layers.3." in inside or ".norm." in inside
    before = {n: p.clone() for n, p in module.named_parameters()}
    outside = [t.clone() for t in module._outside["teacher"].parameters()] if train != "lora" else []
    with module.original() as original:
        ids = torch.arange(20)[None]
        answers = original.model(ids).logits
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        module.losses(batch, batch.visible)["loss"].backward()
        optimizer.step()
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= trained
    never = {n for n in trained if n not in moved}
    if reader == "student":
        assert not never
    else:  # what comes after the last layer's keys and values is not trained, so DDP waits for no gradient of it
        assert not never
        assert not any(f".layers.3.{part}" in n for n in trained for part in ("mlp", "self_attn.q", "self_attn.o"))
        assert any("k_proj" in n for n in moved)
        assert any("v_proj" in n for n in moved)
    with module.original() as original:
        assert torch.equal(original.model(ids).logits, answers)
    if train != "lora":
        teacher = module._outside["teacher"]
        assert all(torch.equal(a, b) for a, b in zip(outside, teacher.parameters(), strict=True))
        assert all(p.grad is None for p in teacher.parameters())
        assert not teacher.training
        assert not any(n.startswith("_outside") or "teacher" in n for n in module.state_dict())


@pytest.mark.parametrize("train", TRAIN)
@torch.no_grad()
def test_original_reader_answers_as_the_original_where_nothing_is_read(
    build: Callable[..., InComeS], records: list[EditRecord], train: str
) -> None:
    module = build(train=train, reader="original", gist=GistConfig(selection="hidden"))
    batch = batch_of(module, records)
    model = module.gists.eval()
    pool = model.compress(batch.edits, batch.edits_mask)
    ids, mask = batch.queries, batch.queries_mask
    with module.original() as original:
        expected = original.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    assert not torch.equal(model(ids, mask, pool)[0].last_hidden_state, expected)
    assert model.matcher is not None
    model.matcher.threshold.fill_(torch.inf)
    assert torch.equal(model(ids, mask, pool)[0].last_hidden_state, expected)
    assert torch.equal(model(ids, mask, None)[0].last_hidden_state, expected)
    with module.original() as original:
        expected_scores = Edited(original, bos=False).score(["City A is in"], ["Land 0"])
    with module.editor().edit(model.backbone, [r.request for r in records]) as edited:  # through the head as well
        (found,), (wanted,) = edited.score(["City A is in"], ["Land 0"]), expected_scores
        assert torch.equal(found.log_probs, wanted.log_probs)


@torch.no_grad()
def test_adapters_reach_the_gists_keys(build: Callable[..., InComeS], records: list[EditRecord]) -> None:
    """A gist's key is what the adapted projection gives, not what the projection under the adapter gives."""
    module = build(train="lora")
    model = module.gists.eval()
    batch = batch_of(module, records[:1])
    ids = batch.edits
    embeds = torch.cat([model.backbone.embed(ids), model.gist_embedding[None, None]], dim=1)
    projected = {}
    for i in model.active:
        keys = model.backbone.attention(i).get_submodule("k_proj")
        keys.register_forward_hook(lambda _, __, out, i=i: projected.update({i: out[0, -1].unflatten(0, (2, 8))}))
    model.language_model.base_model(inputs_embeds=embeds)
    pool = model.compress(ids, batch.edits_mask)
    for i in model.active:
        torch.testing.assert_close(pool.layers[i].keys[0], projected[i], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("train", TRAIN)
def test_teaching_restores_modes_and_adapters_after_an_exception(build: Callable[..., InComeS], train: str) -> None:
    module = build(train=train)
    assert module.gists.language_model.training
    with pytest.raises(RuntimeError, match="inside"), module.teaching() as teacher:  # noqa: PT012 (what is inside raises on purpose)
        assert not teacher.training
        raise RuntimeError("inside")
    assert module.gists.language_model.training


@pytest.mark.parametrize("selection", ["qk", "hidden"])
@pytest.mark.parametrize("train", ["full", "upper"])
def test_gradient_checkpointing_gives_the_same_gradients(
    build: Callable[..., InComeS], records: list[EditRecord], train: str, selection
) -> None:
    found = []
    for on in (False, True):
        module = build(
            train=train,
            gist=GistConfig(selection=selection),
            loss=LossConfig(golden_weight=0.5),
            gradient_checkpointing=on,
        )
        assert module.gists.language_model.is_gradient_checkpointing == on
        batch = batch_of(module, records)
        found.append(gradients(module, module.losses(batch, batch.visible)["loss"]))
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("selection", ["qk", "hidden"])
def test_gradient_checkpointing_reaches_an_original_reader(
    build: Callable[..., InComeS], records: list[EditRecord], selection
) -> None:
    """Its layers that gradients come through are run again, and those below them are not."""
    found, ran = [], []
    for on in (False, True):
        module = build(
            train="upper",
            reader="original",
            gist=GistConfig(selection=selection),
            loss=LossConfig(golden_weight=0.5),
            gradient_checkpointing=on,
        )
        batch, reader = batch_of(module, records), module.gists.reader
        loss = module.losses(batch, batch.visible)["loss"]
        assert not any(part.training for part in reader.model.modules())
        again: list[int] = []
        for i in range(len(reader.layers)):
            reader.attention(i).register_forward_hook(lambda *_, i=i, again=again: again.append(i))
        found.append(gradients(module, loss))
        ran.append(sorted(again))
        module.losses(batch, batch.visible)  # and so it is left as it was
        assert not reader.model.is_gradient_checkpointing
    assert ran == [[], [*module.gists.active]]
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-4)


def test_gradient_checkpointing_is_refused_where_it_cannot_work(build: Callable[..., InComeS]) -> None:
    for options in ({"train": "lora", "reader": "original"},):
        with pytest.raises(ValueError, match="gradient_checkpointing"):
            build(gradient_checkpointing=True, **options)


def test_visible_warm_up(build: Callable[..., InComeS], records: list[EditRecord], monkeypatch) -> None:
    module = build(visible_warmup_steps=10)
    batch = batch_of(module, records * 8)  # 4 distinct edits, 96 queries
    own = F.one_hot(batch.golden.clamp(min=0), len(batch.edits)).bool() & (batch.golden >= 0)[:, None]
    shares = []
    for step in (0, 5, 10):
        monkeypatch.setattr(InComeS, "global_step", property(lambda _, step=step: step))
        visible = module.visible(batch)
        assert torch.equal(visible, module.visible(batch))
        assert (visible | ~own).all()
        assert not (visible & ~batch.visible).any()
        shares.append(float(visible[~own].float().mean()))
    assert shares[0] == 0
    assert 0.3 < shares[1] < 0.7
    assert shares[2] == 1


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
