"""SERAC as a module: its losses against plain references, what it checks, export and back."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from datamodules.records import EditRecord
from datamodules.schedule import Slot
from modules.backbone import BackboneConfig
from modules.export import export, load_editor
from modules.losses import head_of
from modules.serac.batch import SeracQueries
from modules.serac.editor import SeracEdited
from modules.serac.encoder import EncoderConfig, TextEncoder
from modules.serac.negatives import HardConfig, HardNegatives
from modules.serac.scope import ScopeConfig
from modules.trained.serac import SERAC, SeracLoss, SeracOptimizer

BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS, TARGETS = ["City A is in", "Who?", "City B lies in"], ["Land 0", "me", "Peru"]


@pytest.fixture
def serac(tiny_config: Callable[..., BackboneConfig]) -> Callable[..., SERAC]:
    """A random module: serac(supervised=False)."""

    def make(**options: Any) -> SERAC:
        encoder = EncoderConfig("random:bert", overrides=BERT | {"initializer_range": 0.2})
        defaults = {
            "counterfactual": tiny_config("gpt2", n_layer=2, bos_token_id=256, eos_token_id=256),
            "scope": ScopeConfig(encoder),
            "queries": SeracQueries(positives=2, negatives=1, pairs="pool"),
        }
        return SERAC(tiny_config("llama"), **(defaults | options))

    return make


def slots(records: list[EditRecord]) -> list[Slot]:
    return [Slot(r, i // 2, 10 + i) for i, r in enumerate(records)]


def test_losses(serac: Callable[..., SERAC], records: list[EditRecord]) -> None:
    module = serac(loss=SeracLoss(0.3, 0.7))
    batch = module.collator()(slots(records))
    found = module.losses(batch)
    model = module.serac
    edits = model.scope(batch.edits, batch.edits_mask)
    queries = model.scope(batch.queries, batch.queries_mask)
    edit = inside = outside = torch.zeros(())
    for n in range(4):
        for q in range(len(queries)):
            s = (-(queries[q] - edits[n]).square().sum()).exp()
            if batch.positive[q, n]:
                inside = inside - batch.positive[q, n] * s.log() / 4
            if batch.negative[q, n]:
                outside = outside - batch.negative[q, n] * (1 - s).log() / 4
    for b, ids in enumerate(batch.readings):
        mask = batch.readings_mask[b][None]
        logp = model.counterfactual.model(ids[None], attention_mask=mask).logits[0].log_softmax(-1)
        at = batch.readings_answer[b].nonzero()[:, 0]
        edit = edit - logp[at - 1, ids[at]].mean() / 8  # two of each of four records
    for name, expected in {"edit": edit, "scope/inside": inside, "scope/outside": outside}.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], 0.3 * edit + 0.7 * (inside + outside), rtol=1e-4, atol=1e-5)


def test_losses_of_the_mixture(serac: Callable[..., SERAC], records: list[EditRecord]) -> None:
    module = serac(supervised=False, loss=SeracLoss(0.3, 0.7))
    assert module.soft
    batch = module.collator()(slots(records))
    found = module.losses(batch)
    model = module.serac
    edits = model.scope(batch.edits, batch.edits_mask)
    queries = model.scope(batch.queries, batch.queries_mask)
    edit = locality = torch.zeros(())
    for b, (q, n) in enumerate(batch.own.tolist()):
        s = (-(queries[q] - edits[n]).square().sum()).exp()
        p = []
        for of, ids, mask, answer in (
            (model.backbone, batch.plain[b], batch.plain_mask[b], batch.plain_answer[b]),
            (model.counterfactual, batch.readings[b], batch.readings_mask[b], batch.readings_answer[b]),
        ):
            p.append(of.model(ids[None], attention_mask=mask[None]).logits[0].softmax(-1)[answer.nonzero()[:, 0] - 1])
        mixed = (1 - s) * p[0] + s * p[1]
        if batch.in_scope[b]:
            tokens = batch.plain[b][batch.plain_answer[b]]
            edit = edit - mixed[torch.arange(len(tokens)), tokens].log().mean() / 8
        else:
            locality = locality + (p[0] * (p[0] / mixed).log()).sum(-1).mean() / 4
    torch.testing.assert_close(found["edit"], edit, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["locality"], locality, rtol=1e-3, atol=1e-6)
    found["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is None for p in model.backbone.model.parameters())


def test_one_rank_encodes_the_questions_for_all(
    serac: Callable[..., SERAC], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    hard = HardConfig(first=0, last=3, encoder=EncoderConfig("random:bert", overrides=BERT))
    module, sent = serac(queries=SeracQueries(hard=hard)), []
    data = SimpleNamespace(calibration_records=lambda _: records)
    strategy = SimpleNamespace(broadcast=lambda value: sent.append(value) or sent[0])
    ranks: list[Any] = [SimpleNamespace(is_global_zero=zero, strategy=strategy) for zero in (True, False)]
    module._trainer = ranks[0]
    first = module._mined(data)
    alone = HardNegatives(hard, TextEncoder(hard.encoder), records)
    assert torch.equal(first.vectors, alone.vectors)
    assert len(first.vectors) == 4
    monkeypatch.setattr(TextEncoder, "embed", lambda *_: pytest.fail("encoded on every rank"))
    module._trainer = ranks[1]
    assert torch.equal(module._mined(data).vectors, first.vectors)
    assert [v is None for v in sent] == [False, True]


@pytest.mark.parametrize(
    ("queries", "named"),
    [
        (SeracQueries(), r"queries\.hard\.rate 0\.5 \(set it to 0\) changes nothing"),
        (SeracQueries(pairs="pool", hard=HardConfig(rate=0)), r"so queries\.pairs pool \(set it to own\) changes"),
        (SeracQueries(hard=HardConfig(rate=0)), None),
    ],
)
def test_what_the_mixture_ignores_is_told(
    serac: Callable[..., SERAC], queries: SeracQueries, named: str | None
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        serac(queries=queries)  # with pairs everything counts
        assert not caught
        serac(queries=queries, supervised=False)
    assert [bool(re.search(str(named), str(w.message))) for w in caught] == ([True] if named else [])


@pytest.mark.parametrize("supervised", [True, False])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(
    serac: Callable[..., SERAC], records: list[EditRecord], supervised: bool
) -> None:
    module = serac(supervised=supervised)
    collate, every = module.collator(), slots(records)
    whole = module.losses(collate(every))
    halves = [module.losses(collate(part)) for part in (every[:2], every[2:])]
    for name, value in whole.items():
        torch.testing.assert_close(value, (halves[0][name] + halves[1][name]) / 2, rtol=1e-4, atol=1e-5)


def test_recomputed_layers_give_the_same_gradients(serac: Callable[..., SERAC], records: list[EditRecord]) -> None:
    gradients = []
    for again in (False, True):
        module = serac(gradient_checkpointing=again)
        module.losses(module.collator()(slots(records)))["loss"].backward()
        gradients.append([p.grad for p in module.serac.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_trained_and_kept(serac: Callable[..., SERAC]) -> None:
    module = serac()
    module.configure_model()
    names = module.trained_names()
    assert names == {n for n, p in module.named_parameters() if p.requires_grad}
    assert {n.split(".")[1] for n in names} == {"language_model", "scope"}
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    assert set(checkpoint["state_dict"]) - names == {"model.language_model.lm_head.weight"}  # tied
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["state_dict"].keys() == names
    module.on_load_checkpoint(checkpoint)
    checkpoint["state_dict"].popitem()
    with pytest.raises(ValueError, match=r"1 trained tensors are missing"):
        module.on_load_checkpoint(checkpoint)
    assert not any(m.training for m in module.train().serac.modules())


def test_rates(serac: Callable[..., SERAC]) -> None:
    module = serac(optimizer=SeracOptimizer(lr=1e-4, scope_lr=1e-3, warmup_steps=4, eps=1e-6))
    found = module.configure_optimizers()
    language, scope = found["optimizer"].param_groups
    assert (language["initial_lr"], scope["initial_lr"], scope["eps"]) == (1e-4, 1e-3, 1e-6)
    assert scope["lr"] == pytest.approx(1e-3 / 4)
    assert len(language["params"]) + len(scope["params"]) == len(list(module.serac.parameters()))


def trainer(precision: str = "32-true") -> Any:
    return SimpleNamespace(precision=precision, strategy=SimpleNamespace())


def test_wrong_settings_are_named_before_a_model_is_loaded(
    serac: Callable[..., SERAC], tiny_config: Callable[..., BackboneConfig], tmp_path: Path
) -> None:
    serac().check(trainer())
    serac().check(trainer("bf16-mixed"))
    with pytest.raises(ValueError, match=r"trainer\.precision bf16-true"):
        serac().check(trainer("bf16-true"))
    half = BackboneConfig("random:gpt2", dtype="bfloat16")
    with pytest.raises(ValueError, match=r"model\.counterfactual\.dtype bfloat16"):
        serac(counterfactual=half).check(trainer())
    other = serac().tokenizer
    other.add_tokens(["Lyon"])
    other.save_pretrained(tmp_path)
    module = serac(counterfactual=BackboneConfig(str(tmp_path)))
    for does in (lambda: module.check(trainer()), module.configure_model):
        with pytest.raises(ValueError, match=r"does not share the vocabulary.*model\.counterfactual\.source"):
            does()
    with pytest.raises(ValueError, match=r"edit_weight and scope_weight"):
        SeracLoss(edit_weight=-1)
    with pytest.raises(ValueError, match=r"optimizer\.lr and scope_lr"):
        SeracOptimizer(scope_lr=0)
    with pytest.raises(ValueError, match=r"scope\.threshold"):
        ScopeConfig(threshold=1)


def test_the_counterfactual_model_is_another_copy_by_default(tiny_config: Callable[..., BackboneConfig]) -> None:
    module = SERAC(tiny_config("llama", dtype="float32"))
    assert module.counterfactual == module.backbone_config
    assert head_of(module.serac.counterfactual.model).weight is not head_of(module.serac.backbone.model).weight


# ---------------------------------------------------------------------- export


def scores(editor: Any, records: list[EditRecord]) -> tuple[torch.Tensor, list[Any]]:
    with editor.edit(editor.reader, [r.request for r in records]) as edited:
        assert isinstance(edited, SeracEdited)
        return torch.cat([s.log_probs for s in edited.score(PROMPTS, TARGETS)]), edited.scope(PROMPTS)


@pytest.fixture
def trained(serac: Callable[..., SERAC]) -> Callable[..., SERAC]:
    def make(**options: Any) -> SERAC:
        module = serac(**options)
        with torch.no_grad():
            for p in module.serac.parameters():
                p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        return module

    return make


@pytest.mark.parametrize("soft", [False, True])
def test_export_and_back(trained: Callable[..., SERAC], records: list[EditRecord], tmp_path: Path, soft: bool) -> None:
    module = trained(soft=soft, scope=ScopeConfig(EncoderConfig("random:bert", overrides=BERT), "cosine", 0.9))
    expected = scores(module.editor(), records)
    folder = tmp_path / "out"
    export(module, folder, {"step": 7})
    editor: Any = load_editor(folder)
    found = scores(editor, records)
    assert torch.equal(found[0], expected[0])
    assert found[1] == expected[1]
    assert editor.soft == soft
    assert editor.model.scope.config.threshold == 0.9
    assert not any(p.requires_grad for p in editor.model.parameters())
    # transformers reads both models, and nothing in the folder runs code
    ids = torch.arange(1, 9)[None]
    model = module.serac
    plain = AutoModelForCausalLM.from_pretrained(folder / "counterfactual")
    torch.testing.assert_close(plain(ids).logits, model.counterfactual.model(ids).logits)
    encoder = AutoModel.from_pretrained(folder / "scope")
    expected_states = model.scope.encoder.model(ids).last_hidden_state
    torch.testing.assert_close(encoder(ids).last_hidden_state, expected_states)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".txt", ".jinja", ".md"}
    about = json.loads((folder / "editor.json").read_text(encoding="utf-8"))
    assert (about["editor"], about["step"], about["scope_of"]) == ("serac", 7, "random:bert")


def test_an_export_can_be_moved(trained: Callable[..., SERAC], records: list[EditRecord], tmp_path: Path) -> None:
    module = trained()
    export(module, tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "moved")
    assert torch.equal(scores(load_editor(tmp_path / "moved"), records)[0], scores(module.editor(), records)[0])


@pytest.mark.parametrize("part", ["counterfactual", "scope"])
def test_missing_files_are_named(trained: Callable[..., SERAC], tmp_path: Path, part: str) -> None:
    export(trained(), tmp_path / "out")
    file = tmp_path / "out" / part / "model.safetensors"
    kept = file.read_bytes()
    file.unlink()
    with pytest.raises(ValueError, match=rf"{part} has no safetensors"):
        load_editor(tmp_path / "out")
    file.write_bytes(kept[:100])
    with pytest.raises(ValueError, match=rf"cannot load.*{part}"):
        load_editor(tmp_path / "out")
    file.write_bytes(kept)
    facts = tmp_path / "out" / "editor.json"
    about = json.loads(facts.read_text(encoding="utf-8"))
    del about["scope"]
    facts.write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"editor\.json cannot be read"):
        load_editor(tmp_path / "out")
