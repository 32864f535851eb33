"""DistillMIKE on tiny models: its loss, one set of edits as an editor, and its export."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from told import RightEdit
from transformers import AutoModelForCausalLM

from datamodules.records import EditRecord, EditRequest, Query
from datamodules.schedule import Slot
from datamodules.tokens import encode
from modules.backbone import Backbone, BackboneConfig
from modules.distill.queries import DistillCollator, DistillQueries, questions_of
from modules.distill.start import as_sum, keep
from modules.distill.store import Answered, Teaching, file_of, teach
from modules.distill.student import AdapterOptions, Student
from modules.distill.teacher import asked_of
from modules.editor import Edited
from modules.export import export, load_editor
from modules.interventions import LowRank
from modules.summed import Summed
from modules.trained.distillmike import DistillLoss, DistillMIKE

PROMPTS, TARGETS = ["City A is in", "Where is City B? In", "Village C is in"], ["Land 0", "Land 1", "Peru"]
START = "model.layers.1.mlp.down_proj"


@pytest.fixture
def trained(tiny: Callable[..., Backbone], tmp_path: Path) -> Callable[..., DistillMIKE]:
    """A module on a saved folder with a start and adapters that are not zero, and a teacher that has been asked."""

    def make(
        records: Sequence[EditRecord],
        kind: str = "llama",
        targets: Sequence[str] = ("q_proj", "v_proj"),
        **options: Any,
    ) -> DistillMIKE:
        backbone = tiny(kind, tie_word_embeddings=True)
        base = tmp_path / "base"
        backbone.model.save_pretrained(base)
        backbone.tokenizer.save_pretrained(base)
        adapters = AdapterOptions(rank=4, alpha=8, targets=list(targets))
        module = DistillMIKE(BackboneConfig(str(base)), RightEdit(), adapters=adapters, **options)
        module.requests = tuple(r.request for r in records)
        questions = [q for r in records for q in questions_of(r, module.queries)]
        with RightEdit().edit(backbone, module.requests) as edited:
            asked = asked_of(edited, backbone, questions)
        teaching = Teaching(module.teaching.top_k, folder=str(tmp_path))
        file = file_of(teaching, backbone, "", asked)
        teach(teaching, backbone, asked, file)
        module.answered = Answered([file])
        module.configure_model()
        if kind == "llama":
            module.student.start = {START: Summed(0.1 * torch.randn(3, 48), 0.1 * torch.randn(3, 32))}
        for name, p in module.student.named_parameters():
            if "lora_B" in name:
                p.data += 0.1 * torch.randn_like(p)
        module.student.eval()
        return module

    return make


def scores(edited: Edited) -> torch.Tensor:
    return torch.cat([s.log_probs for s in edited.score(PROMPTS, TARGETS)])


def logits(model: Any, text: str, module: DistillMIKE) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([encode(module.tokenizer, text).ids])).logits


def test_loss(trained: Callable[..., DistillMIKE], records: list[EditRecord], tiny: Callable[..., Backbone]) -> None:
    """Question by question in plain torch: the teacher reads the context, the student does not."""
    module = trained(records, loss=DistillLoss(ike_weight=3.0, base_weight=0.5))
    base = tiny(tie_word_embeddings=True)
    found = module.losses(module.collator()([Slot(r, 0, i) for i, r in enumerate(records)]))
    ike, plain = [], []
    with torch.no_grad(), RightEdit().edit(base, module.requests) as edited:
        for record in records:
            for q in questions_of(record, DistillQueries()):
                (context,) = edited.contexts([q.prompt])
                told, bare = encode(base.tokenizer, q.prompt, q.target, context or ""), encode(base.tokenizer, *q)
                n, ids = len(bare.target_ids), torch.tensor([bare.ids])
                p = base.model(torch.tensor([told.ids])).logits[0, -n - 1 : -1].log_softmax(-1)
                hidden = module.student(ids, torch.ones_like(ids))[0, -n - 1 : -1]
                kl = torch.nn.functional.kl_div(
                    base.logits(hidden).log_softmax(-1), p, log_target=True, reduction="none"
                )
                (ike if context else plain).append(kl.sum(-1).mean() / len(questions_of(record, DistillQueries())) / 4)
    torch.testing.assert_close(found["ike"], sum(ike), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["base"], sum(plain), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found["loss"], 3 * sum(ike) + 0.5 * sum(plain), rtol=1e-4, atol=1e-6)
    assert plain
    assert ike


def test_any_split_gives_the_same_gradient(trained: Callable[..., DistillMIKE], records: list[EditRecord]) -> None:
    short = EditRecord("short", (EditRequest("City E is in", "Land 9 and so on", "City E"),))
    module = trained([*records, short, records[0]], loss=DistillLoss(chunk=5))
    slots = [Slot(r, 0, i) for i, r in enumerate([*records[:3], short])]
    module.student.double()
    collate = module.collator()

    def gradient(*parts: list[Slot]) -> dict[str, torch.Tensor]:
        module.zero_grad()
        for part in parts:
            (module.losses(collate(part))["loss"] / len(parts)).backward()
        return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    whole = gradient(slots)
    for name, split in gradient(slots[:2], slots[2:]).items():
        torch.testing.assert_close(split, whole[name])
    one_pass = DistillCollator(module.tokenizer, DistillQueries(passes=1))(slots)
    assert len(one_pass.passes) == 1 < len(collate(slots).passes)
    module.zero_grad()
    module.losses(one_pass)["loss"].backward()
    for name, together in ((n, p.grad) for n, p in module.named_parameters() if p.grad is not None):
        torch.testing.assert_close(together, whole[name])
    module.gradient_checkpointing = True
    for name, again in gradient(slots).items():
        torch.testing.assert_close(again, whole[name])
    assert all("lora_" in name for name in whole)
    assert all(g.abs().max() > 0 for g in whole.values())


@pytest.mark.parametrize("top_k", [3, 10**6])
def test_kept_in_part(trained: Callable[..., DistillMIKE], records: list[EditRecord], top_k: int) -> None:
    torch.manual_seed(1)
    whole = trained(records)
    torch.manual_seed(1)
    part = trained(records, teaching=Teaching(top_k))
    for name, p in part.student.named_parameters():
        p.data.copy_(whole.student.get_parameter(name))
    part.student.start = whole.student.start
    batch = whole.collator()([Slot(r, 0, i) for i, r in enumerate(records)])
    exact, found = whole.losses(batch)["loss"].item(), part.losses(batch)["loss"].item()
    if top_k > 1000:
        assert found == pytest.approx(exact, rel=1e-4)
    else:
        assert 0 < found < exact


def test_edits_are_there_within_the_with_alone(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], tiny: Callable[..., Backbone]
) -> None:
    module = trained(records)
    editor, backbone = module.editor(), tiny(tie_word_embeddings=True)
    before = scores(Edited(backbone))
    weights = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    with editor.edit(backbone, [records[0].request]) as edited, edited.edit([records[1].request]) as further:
        assert torch.equal(scores(further), scores(edited))
        assert not torch.allclose(scores(edited), before, atol=1e-2)
        assert torch.equal(scores(Edited(backbone)), before)
        assert further.requests == module.requests[:2]
        assert set(edited.weight_changes()) == set(editor.terms)
    with editor.edit(backbone, []) as nothing:
        assert torch.equal(scores(nothing), before)
    assert all(torch.equal(t, weights[n]) for n, t in backbone.model.state_dict().items())
    # on the module's own model, whose adapters are in place
    with editor.edit(module.student.backbone, module.requests) as own, editor.edit(backbone, module.requests) as other:
        torch.testing.assert_close(scores(own), scores(other), atol=1e-5, rtol=1e-5)
    with module.original() as original:
        assert torch.equal(scores(Edited(original)), before)


def test_requests_that_were_not_distilled(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], tiny: Callable[..., Backbone]
) -> None:
    editor = trained(records).editor()
    other = EditRequest("City A is in", "Peru", "City A")
    backbone = tiny(tie_word_embeddings=True)
    message = r"1 of 2 edits are not among the 4 distilled, such as 'City A is in Peru\.'"
    with pytest.raises(ValueError, match=message), editor.edit(backbone, [records[0].request, other]):
        pass
    with editor.edit(backbone, [records[0].request]) as edited, pytest.raises(ValueError, match="not among the 4"):
        edited.edit([other]).__enter__()
    with pytest.raises(ValueError, match="cannot edit"), editor.edit(tiny("gpt2"), [records[0].request]):
        pass
    with pytest.raises(ValueError, match="cannot edit"), editor.edit(tiny(num_hidden_layers=1), [records[0].request]):
        pass


def test_a_check_reads_the_requests_that_are_asked_for_alone(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, read = trained(records).editor(), []
    monkeypatch.setattr(EditRequest, "statement", property(lambda r: read.append(r) or f"{r.prompt} {r.target}"))
    editor.check([records[0].request])
    read.clear()
    editor.check([records[0].request, records[2].request])
    assert read == [records[0].request, records[2].request]


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("llama", ["q_proj", "v_proj"]),
        ("llama", ["q_proj", "down_proj"]),  # where the start is too
        ("gpt2", ["c_attn"]),
        ("gpt_neox", ["query_key_value"]),
        ("gptj", ["q_proj", "v_proj"]),
    ],
)
def test_export_and_back(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], tmp_path: Path, kind: str, targets: list[str]
) -> None:
    module = trained(records, kind, targets)
    with module.editor().edit(module.student.backbone, module.requests) as edited:
        expected = scores(edited)
    folder = tmp_path / "out"
    export(module, folder, {"step": 7})

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base, PROMPTS[0], module)
    loaded = load_editor(folder)
    assert loaded.name == "distillmike"
    with loaded.edit(loaded.reader, module.requests) as again:
        torch.testing.assert_close(scores(again), expected, atol=1e-5, rtol=1e-5)
        merged = again.merge()  # type: ignore[attr-defined]
    assert torch.equal(logits(loaded.reader.model, PROMPTS[0], module), plain)
    adapted = PeftModel.from_pretrained(base, folder)
    torch.testing.assert_close(
        logits(adapted, PROMPTS[0], module), logits(merged, PROMPTS[0], module), atol=1e-4, rtol=1e-4
    )
    assert not torch.allclose(logits(merged, PROMPTS[0], module), plain, atol=1e-2)
    assert not any("lora" in n for n, _ in merged.named_modules())

    about = json.loads((folder / "editor.json").read_text(encoding="utf-8"))
    assert (about["step"], about["edits"], about["adapters"]["rank"]) == (7, 4, 4)
    assert (folder / "start").is_dir() == (kind == "llama")
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".md"}


def test_a_cast_export(trained: Callable[..., DistillMIKE], records: list[EditRecord], tmp_path: Path) -> None:
    """peft and others write adapters in 16 bits too."""
    module = trained(records)
    export(module, tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file)
    loaded: Any = load_editor(tmp_path / "out")
    reader, asked = loaded.reader, module.requests
    with loaded.edit(reader, asked) as cast, module.editor().edit(reader, asked) as own:
        assert {t.dtype for term in loaded.terms.values() for t in (term.a, term.b)} == {torch.float32}
        torch.testing.assert_close(scores(cast), scores(own), atol=0.1, rtol=0.02)


def checkpoint_of(module: DistillMIKE) -> dict[str, Any]:
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def started(module: DistillMIKE, start: str | None) -> DistillMIKE:
    return DistillMIKE(module.backbone_config, RightEdit(), start, adapters=module.adapters)


def test_a_start_in_a_folder_is_not_in_the_checkpoints(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], tmp_path: Path
) -> None:
    folder, other = tmp_path / "start", tmp_path / "other"
    keep({START: torch.randn(48, 32)}, [r.request for r in records], folder)
    keep({START: torch.randn(48, 32)}, [r.request for r in records], other)
    module = trained(records, start=str(folder))
    module.student.start = module._named_start(module.student.backbone)
    checkpoint = checkpoint_of(module)
    assert set(checkpoint["distilled"]) == {"requests", "start_digest"}

    again = started(module, str(folder))  # as an export has it, which reads no data
    again.on_load_checkpoint(checkpoint)
    assert again.requests == module.requests
    assert torch.equal(again.student.start[START].weight(), module.student.start[START].weight())
    assert checkpoint_of(again)["distilled"] == checkpoint["distilled"]
    for wrong in (str(other), None):
        with pytest.raises(ValueError, match=r"model\.start: .*started from edits in a folder.*others, or none"):
            started(module, wrong).on_load_checkpoint(checkpoint)
    (folder / "deltas.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.start: .*holds no deltas\.safetensors"):
        started(module, str(folder)).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize("rank", [3, 32])
def test_a_start_that_was_made_is_in_the_checkpoints(
    trained: Callable[..., DistillMIKE], records: list[EditRecord], rank: int
) -> None:
    """As a matrix where that is smaller; one of before, in factors alone, is read as well."""
    module = trained(records)
    term = LowRank(torch.randn(1, rank, 48), torch.randn(1, rank, 32))
    module.student.start = {START: as_sum(term.a[0], term.b[0])}
    checkpoint = checkpoint_of(module)
    (kept,) = checkpoint["distilled"]["start"].values()
    assert sum(t.numel() for t in kept.values()) == (3 * (48 + 32) if rank == 3 else 48 * 32)
    old = {"requests": checkpoint["distilled"]["requests"], "start": {START: {"a": term.a, "b": term.b}}}
    for distilled in (checkpoint["distilled"], old):
        again = started(module, None)
        again.on_load_checkpoint(checkpoint | {"distilled": distilled})
        for part in ("a", "b"):
            assert torch.equal(getattr(again.student.start[START], part), getattr(module.student.start[START], part))
        assert torch.equal(again.student.start[START].weight(), module.student.start[START].weight())


def test_damaged_exports(trained: Callable[..., DistillMIKE], records: list[EditRecord], tmp_path: Path) -> None:
    export(trained(records), tmp_path / "out")
    file = tmp_path / "out" / "adapter_model.safetensors"
    whole = load_file(file)
    first = next(iter(whole))
    save_file({n: t for n, t in whole.items() if n != first}, file)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors lacks"):
        load_editor(tmp_path / "out")
    save_file(whole | {first: torch.zeros(4, 5)}, file)
    with pytest.raises(ValueError, match="of a model of another size"):
        load_editor(tmp_path / "out")
    save_file(whole, file)
    (tmp_path / "out" / "edits.json").unlink()
    with pytest.raises(ValueError, match=r"has no edits\.json"):
        load_editor(tmp_path / "out")


def test_an_in_scope_neighbour_goes_to_the_told_teacher(trained: Callable[..., DistillMIKE]) -> None:
    """As released: retrieval decides, whatever kind of prompt it is."""
    near = Query("The mayor of City A is", ("Bo",))
    far = Query("The mayor of Ulm is", ("Al",))
    record = EditRecord("x", (EditRequest("City A is in", "Peru", "City A"),), locality={"near": (near, far)})
    module = trained([record])
    batch = module.collator()([Slot(record, 0, 0)])
    assert module.answered is not None
    _, inside = module.answered.look_up(batch.asked, torch.device("cpu"))
    assert {q.prompt for q, i in zip(batch.asked, inside.tolist(), strict=True) if i} == {"City A is in", near.prompt}


def test_the_student_is_the_base_model_at_first(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = backbone.model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(Student(backbone, AdapterOptions(), {})(ids, torch.ones_like(ids)), before)


def test_nothing_is_dropped_out_whoever_asks_for_training(tiny_config: Callable[..., BackboneConfig]) -> None:
    """A run that goes on within an epoch calls no hook that begins one."""
    module = DistillMIKE(tiny_config(attention_dropout=0.5), RightEdit())
    module.configure_model()
    ids = torch.arange(12)[None]
    for student in (module.student, module.train().student):
        assert not any(m.training for m in student.modules())
        assert torch.equal(student(ids, torch.ones_like(ids)), student(ids, torch.ones_like(ids)))


def test_a_start_that_is_not_there_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    module = DistillMIKE(BackboneConfig("random:llama"), RightEdit(), start=str(tmp_path))
    with pytest.raises(ValueError, match=r"model\.start: .* holds no deltas\.safetensors"):
        module.check(type("Trainer", (), {"precision": "32-true"})())  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_precision_is_checked(precision: str) -> None:
    module = DistillMIKE(BackboneConfig("random:llama"), RightEdit())
    with pytest.raises(ValueError, match=f"trainer.precision {precision}"):
        module.check(type("Trainer", (), {"precision": precision})())  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"ike_weight": -1.0}, {"ike_weight": 0.0, "base_weight": 0.0}, {"chunk": 0}])
def test_loss_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"model\.loss\.ike_weight"):
        DistillLoss(**wrong)
