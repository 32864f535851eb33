"""Knowledge Neurons: completeness of integrated gradients, plain gradients, and which values change by how much."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules.backbone import PARTS, Backbone
from modules.interventions import linear
from modules.training_free import kn
from modules.training_free.kn import KN, attributions

KINDS = sorted(PARTS)


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [replace(record.request, old_target="Peru") for record in records]


def probability(backbone: Backbone, prompt: Sequence[int], answer: int, name: str, share: float) -> Tensor:
    """With the neurons of one layer scaled at the last token; the whole prompt read, nothing cached."""

    def scale(_: torch.nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = given[0].clone()
        x[:, -1] *= share
        return (x,)

    with linear(backbone.model, name).register_forward_pre_hook(scale):
        return backbone.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)[answer]


@pytest.mark.parametrize("kind", KINDS)
def test_attributions_add_up_to_the_change_of_the_probability(tiny: Callable[..., Backbone], kind: str) -> None:
    """The axiom of completeness, for each layer; the midpoint rule's error is small at 40 steps."""
    backbone = tiny(kind)
    backbone.model.double()
    prompt, names = backbone.tokenizer("City A is")["input_ids"], KN().names(backbone)
    answer = int(backbone.model(torch.tensor([prompt])).logits[0, -1].argmax())
    found = attributions(backbone, names, prompt, answer, steps=40, batch_size=64)
    whole = torch.stack(
        [probability(backbone, prompt, answer, n, 1.0) - probability(backbone, prompt, answer, n, 0.0) for n in names]
    )
    assert whole.abs().max() > 1e-2
    torch.testing.assert_close(found.sum(1), whole.float(), rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("length", [1, 6])
def test_one_step_is_the_gradient_in_the_middle(tiny: Callable[..., Backbone], length: int) -> None:
    """By finite differences; also for a prompt of one token, with nothing before it."""
    backbone = tiny()
    backbone.model.double()
    prompt = backbone.tokenizer("City A")["input_ids"][:length]
    name = KN().names(backbone)[1]
    found = attributions(backbone, [name], prompt, 70, steps=1, batch_size=8)
    higher, lower = (probability(backbone, prompt, 70, name, 0.5 + d) for d in (1e-2, -1e-2))
    torch.testing.assert_close(found.sum(), ((higher - lower) / 2e-2).float(), rtol=2e-3, atol=1e-9)


def test_passes_of_any_size_are_the_same(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    prompt, names = backbone.tokenizer("City A")["input_ids"], KN().names(backbone)
    a, b = (attributions(backbone, names, prompt, 70, 5, size) for size in (3, 100))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_begins_at_the_lowest_layer_that_it_scales(
    tiny: Callable[..., Backbone], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as from the embedding; in float64, as one row and six are rounded differently."""
    backbone = tiny(kind)
    backbone.model.double()
    prompt, names = backbone.tokenizer("City A")["input_ids"], KN().names(backbone)
    ran: list[int] = []
    for i in range(len(names)):
        backbone.attention(i).register_forward_hook(lambda *_, i=i: ran.append(i))
    found = attributions(backbone, names, prompt, 70, 3, 6)  # 12 rows: those of layers 0 and 1, then of 2 and 3
    whole = [0, 1, 2, 3]
    assert ran == [*whole * 2, *whole, 2, 3]  # what stands before, the neurons as they are, and the two passes
    ran.clear()
    monkeypatch.setattr(kn, "layer_of", lambda *_: 0)
    torch.testing.assert_close(attributions(backbone, names, prompt, 70, 3, 6), found, rtol=1e-5, atol=1e-9)
    assert ran == whole * 4


@pytest.mark.parametrize("embedding", ["input", "output"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_changes_are_the_values_of_the_found_neurons(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str, embedding: str
) -> None:
    backbone = tiny(kind, tie_word_embeddings=False)
    editor = KN(steps=4, threshold=0.3, erase=1.0, write=3.0, embedding=embedding)  # type: ignore[arg-type]
    request = replace(requests[0], old_target="Peru", target="me")
    neurons, value = editor.change(backbone, request)
    table = (backbone.model.lm_head if embedding == "output" else backbone.model.get_input_embeddings()).weight
    old, new = (backbone.tokenizer(t)["input_ids"] for t in (" Peru", " me"))
    torch.testing.assert_close(value, 3 * table[new].sum(0) - table[old].sum(0))
    ids = [*backbone.tokenizer(request.prompt)["input_ids"], *old]
    names, tokens = editor.names(backbone), range(len(ids) - 5, len(ids))
    each = torch.stack([attributions(backbone, names, ids[:at], ids[at], 4, 64) for at in tokens]).mean(0)
    assert torch.equal(neurons.bool(), each > 0.3 * each.max())
    assert 0 < int(neurons.sum()) < neurons.numel() / 2
    with editor.edit(backbone, [request]) as edited:
        model = edited.merge()
    for layer, name in enumerate(editor.names(backbone)):
        after, before = (linear(m, name).weight for m in (model, backbone.model))
        change = (after - before).T if kind == "llama" else after - before  # type: ignore[operator]
        torch.testing.assert_close(change, neurons[layer][:, None] * value, atol=1e-5, rtol=1e-5)


def test_the_old_answer_is_needed(
    tiny: Callable[..., Backbone], requests: list[EditRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    monkeypatch.setattr(type(backbone.model.base_model), "forward", lambda *_, **__: pytest.fail("worked"))
    without = replace(requests[1], old_target=None)
    with pytest.raises(ValueError, match="old_target"), KN().edit(backbone, [requests[0], without]):
        pass


def test_further_neurons_are_found_at_the_edited_model(
    tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """The attribution under an edit is that of the model with the edit in its weights."""
    backbone = tiny()
    editor = KN(steps=3, write=4.0)
    with editor.edit(backbone, requests[:1]) as edited:
        merged = Backbone(edited.merge(), backbone.tokenizer, backbone.config)
        prompt, names = backbone.tokenizer("City B is")["input_ids"], editor.names(backbone)
        with edited.applied():
            under = attributions(backbone, names, prompt, 70, 3, 64)
    torch.testing.assert_close(under, attributions(merged, names, prompt, 70, 3, 64), rtol=1e-3, atol=1e-7)
    assert not torch.allclose(under, attributions(backbone, names, prompt, 70, 3, 64), rtol=1e-3, atol=1e-7)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="threshold"):
        KN(threshold=1.0)
    with pytest.raises(ValueError, match="embedding"):
        KN(embedding="both")  # type: ignore[arg-type]
