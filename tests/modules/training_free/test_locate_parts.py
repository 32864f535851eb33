"""What editors that locate facts are made of: layers, contexts, states at the subject."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.training_free.locate import layer_numbers
from modules.training_free.subject import row, subject_states
from modules.training_free.templates import Contexts


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [r.request for r in records]


def test_layers_by_number_and_by_depth(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    assert layer_numbers(backbone, [0.25, 0.3, -1, 2]) == [1, 2, 3]
    for wrong in ([4], [1.5], [-5], []):
        with pytest.raises(ValueError, match="layers must be"):
            layer_numbers(backbone, wrong)


def test_contexts_are_drawn_once_for_a_model_by_their_seed(tiny: Callable[..., Backbone]) -> None:
    backbone, other, again = tiny(), tiny("llama", hidden_size=24), tiny()
    before = torch.get_rng_state()
    contexts = Contexts(counts={6: 3, 12: 2})
    drawn = contexts.draw(backbone)
    assert drawn[0] == ""
    assert len(drawn) == 6
    assert all(text.endswith(". ") for text in drawn[1:])
    assert [text[:2] for text in drawn[1:]] == ["Th", "Th", "Be", "Th", "Th"]  # each length begins anew
    assert contexts.draw(backbone) is drawn
    assert contexts.draw(again) == drawn  # the same weights, another object
    assert contexts.draw(other) != drawn
    assert replace(contexts, seed=1).draw(backbone) != drawn
    assert replace(contexts, starts=[""]).draw(backbone) != drawn
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="must be positive"):
        Contexts(counts={0: 1})


def test_states_at_the_subject_are_those_of_whole_passes(
    tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    backbone = tiny()
    rows = [row(backbone, r.prompt, str(r.subject), prefix=p) for r in requests for p in ("", "Before this. ")]
    name, stem = "model.layers.2.mlp.down_proj", "model.layers.2"
    found = subject_states(backbone, rows, [name], [name, stem], chunk=3)
    assert set(found) == {name, f"{name}.out", stem}
    for i, r in enumerate(rows):
        got: dict[str, Tensor] = {}
        handles = [
            backbone.model.get_submodule(n).register_forward_hook(
                lambda _, a, o, n=n, got=got: got.update({n: o, f"{n}.in": a[0]})
            )
            for n in (name, stem)
        ]
        with torch.no_grad():
            backbone.model(input_ids=torch.tensor([r.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found[name][i], got[f"{name}.in"][0, r.subject], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[f"{name}.out"][i], got[name][0, r.subject], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[stem][i], got[stem][0, r.subject], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="do not fit the context window"):
        row(tiny("gpt2"), "x" * 300 + " is", "x" * 300)
