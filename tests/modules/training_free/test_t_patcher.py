"""T-Patcher: its losses against plain code, its short way to the logits, and silence on what it remembers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.records import EditRecord, EditRequest
from modules.backbone import PARTS, Backbone
from modules.editor import Edited
from modules.training_free.neurons import Neurons, Queries, look, losses
from modules.training_free.shared import encode_targets
from modules.training_free.t_patcher import Patched, TPatcher

KINDS = sorted(PARTS)


@pytest.fixture
def requests(records: list[EditRecord]) -> list[EditRequest]:
    return [record.request for record in records]


def random_neurons(editor: TPatcher, backbone: Backbone, count: int, size: int, scale: float) -> Neurons:
    draw = torch.Generator().manual_seed(7)
    start = editor.start(backbone, count, size)
    return Neurons(*(scale * torch.randn(t.shape, generator=draw) for t in start))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_short_way_to_the_logits_is_the_whole_model(
    tiny: Callable[..., Backbone], requests: list[EditRequest], kind: str
) -> None:
    """The edit's loss from the last FFN on, against the model with the neurons in it."""
    backbone = tiny(kind)
    editor = TPatcher(activation_weight=0.0, memory_weight=0.0)
    request = [EditRequest("City A is in", "Land")]
    rows = encode_targets(backbone, request)
    queries = Queries.of(backbone, rows, look(backbone, [rows[0].ids]), per_token=False)
    neurons = random_neurons(editor, backbone, 1, 1, 0.3)
    act = editor.act(backbone)
    found = losses(editor.weights, backbone, neurons, queries, queries.x[0], act)
    patched = Patched(editor, backbone, request, Neurons(*(t[0] for t in neurons)), torch.tensor([0]))
    score = patched.score(["City A is in"], ["Land"])[0]
    torch.testing.assert_close(found[0], -score.log_probs.mean(), rtol=1e-4, atol=1e-5)
    unedited = Edited(backbone).score(["City A is in"], ["Land"])[0]
    assert (score.log_probs - unedited.log_probs).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_neuron_is_one_more_column_of_the_ffn(tiny: Callable[..., Backbone], kind: str) -> None:
    """Against the FFN's own code with its matrices one wider."""
    backbone = tiny(kind)
    editor = TPatcher()
    neurons = Neurons(*(t[0] for t in random_neurons(editor, backbone, 1, 2, 0.5)))
    mlp: Any = backbone.layers[-1].get_submodule("mlp")
    x = torch.randn(3, 4, 32, generator=torch.Generator().manual_seed(1))
    if kind == "llama":
        gate = torch.cat([x @ mlp.gate_proj.weight.T, x @ neurons.k.T + neurons.b], -1)
        up = torch.cat([x @ mlp.up_proj.weight.T, x @ neurons.u.T + neurons.c], -1)
        expected = (F.silu(gate) * up) @ torch.cat([mlp.down_proj.weight.T, neurons.v])
    else:
        inner = torch.cat([mlp.c_fc(x), x @ neurons.k.T + neurons.b], -1)
        expected = mlp.act(inner) @ torch.cat([mlp.c_proj.weight, neurons.v]) + mlp.c_proj.bias
    torch.testing.assert_close(mlp(x) + neurons(x, editor.act(backbone)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per", ["edit", "token"])
def test_the_losses_are_plain_ones(tiny: Callable[..., Backbone], requests: list[EditRequest], per: Any) -> None:
    backbone = tiny()
    editor = TPatcher(per=per, activation_weight=0.3, memory_weight=0.7, silence=-1.0, gap=-2.0, top=3)
    requests = [*requests[:2], EditRequest("Who?", "me")]  # of several lengths
    rows = encode_targets(backbone, requests)
    queries = Queries.of(backbone, rows, look(backbone, [r.ids for r in rows]), per == "token")
    size = queries.own.shape[2]
    assert size == (max(len(r.ids) - r.start for r in rows) if per == "token" else 1)
    neurons = random_neurons(editor, backbone, 3, size, 0.1)
    memory = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    found = losses(editor.weights, backbone, neurons, queries, memory, editor.act(backbone))
    own = [look(backbone, [r.ids]).x[0, r.start - 1 : -1] for r in rows]
    for i in range(3):
        count = len(own[i]) if per == "token" else 1
        patched = Patched(
            editor, backbone, requests[i : i + 1], Neurons(*(t[i, :count] for t in neurons)), torch.zeros(count)
        )
        edit = -patched.score([requests[i].prompt], [requests[i].target])[0].log_probs.mean()
        others = torch.cat([memory, *own[:i], *own[i + 1 :]])
        terms = []
        for j in range(count):
            k, b = neurons.k[i, j], neurons.b[i, j]
            q = own[i][j : j + 1] @ k + b if per == "token" else own[i] @ k + b
            m = (others @ k + b).topk(3).values
            silent = (m + 1.0).exp().mean() + (m - q.mean() + 2.0).exp().mean()
            terms.append(0.3 * (-q).exp().mean() + 0.7 * silent)
        torch.testing.assert_close(found[i], edit + torch.stack(terms).mean(), rtol=1e-4, atol=1e-4)


def test_edits_side_by_side_share_nothing_but_memory(
    tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """Without the memory losses, in which the others' queries are, each is what it is alone."""
    backbone = tiny()
    backbone.model.double()
    editor = TPatcher(per="token", steps=10, memory_weight=0.0, texts=["Who?"])
    with editor.edit(backbone, requests) as together:
        assert together.neurons is not None
        for i, request in enumerate(requests):
            with editor.edit(backbone, [request]) as alone:
                assert alone.neurons is not None
                mine = together.of == i
                for a, b in zip(together.neurons, alone.neurons, strict=True):
                    torch.testing.assert_close(a[mine], b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("per", ["edit", "token"])
def test_earlier_edits_are_remembered_without_being_run_again(
    tiny: Callable[..., Backbone], requests: list[EditRequest], per: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is carried on, against what the model takes at the earlier edits' positions when all of them are run."""
    backbone = tiny()
    backbone.model.double()
    editor = TPatcher(per=per, steps=10, memory_weight=1.0, texts=["Who?"])
    carried = Patched(editor, backbone).add(requests[:2]).add([EditRequest("Who?", "me")])

    def anew(edited: Patched, inputs: Any = None) -> Patched:
        return Patched(editor, backbone, edited.requests, edited.neurons, edited.of, inputs)

    def same(one: Patched, other: Patched) -> bool:
        assert one.neurons is not None
        assert other.neurons is not None
        return all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(one.neurons, other.neurons, strict=True))

    for before in (carried, carried.remove(requests[:1])):
        assert same(before.add(requests[2:3]), anew(before).add(requests[2:3]))
        assert not same(before.add(requests[2:3]), anew(before, []).add(requests[2:3]))  # they do tell

    passes: list[int] = []
    real = backbone.model.base_model.forward
    monkeypatch.setattr(
        backbone.model.base_model, "forward", lambda **given: (passes.append(len(given["input_ids"])), real(**given))[1]
    )
    carried.add(requests[2:3])
    assert passes == [1, 1]  # the memory's text, and the edit


def test_memory_silences_a_neuron_and_relu_makes_that_exact(
    tiny: Callable[..., Backbone], requests: list[EditRequest]
) -> None:
    """Text that is remembered is answered as before, bit for bit; without the memory losses it is not."""
    backbone = tiny()
    text = "Village B is in Peru."
    given: dict[str, Any] = {"steps": 150, "lr": 0.03, "relu": True, "texts": [text], "activation_weight": 1.0}
    asked = ["Village B is in"], ["Peru"]
    before = Edited(backbone).score(*asked)[0].log_probs

    def moved(editor: TPatcher) -> Tensor:
        with editor.edit(backbone, requests[:1]) as edited:
            own = edited.score([requests[0].prompt], [requests[0].target])[0].log_probs
            old = Edited(backbone).score([requests[0].prompt], [requests[0].target])[0].log_probs
            assert float((own - old).mean()) > 0.3
            return (edited.score(*asked)[0].log_probs - before).abs().max()

    assert float(moved(TPatcher(**given, memory_weight=1.0, silence=-1.0))) == 0
    assert float(moved(TPatcher(**given, memory_weight=0.0))) > 0.01


def test_all_zero_has_no_gradient_so_it_is_refused() -> None:
    with pytest.raises(ValueError, match="init positive"):
        TPatcher(init=0.0)
    with pytest.raises(ValueError, match="edit or token"):
        TPatcher(per="fact")  # type: ignore[arg-type]


def test_memory_is_the_texts_or_sampled_by_the_seed(
    tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    assert TPatcher(texts=["Who?"]).memory(backbone) == [tuple(backbone.tokenizer("Who?")["input_ids"])]
    one, again, other = (TPatcher(samples=2, sample_tokens=5, seed=s).memory(tiny()) for s in (1, 1, 2))
    assert one == again != other
    assert [len(row) for row in one] == [6, 6]
    editor = TPatcher(samples=2, sample_tokens=5, seed=1)
    assert editor.memory(backbone) == one
    monkeypatch.setattr(backbone.model.base_model, "forward", None)  # it is not asked again
    assert editor.memory(backbone) == one
