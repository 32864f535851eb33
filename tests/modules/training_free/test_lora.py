"""LoRA: the layers it takes, its start, and AdaLoRA's factors against what peft makes of the same numbers."""

from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited
from modules.interventions import low_rank
from modules.training_free.lora import Factors, LoRA, SingularFactors

LAYERS = {
    "llama": ["self_attn.q_proj", "self_attn.v_proj"],
    "qwen3": ["self_attn.q_proj", "self_attn.v_proj"],
    "gpt2": ["attn.c_attn"],
    "gptj": ["attn.q_proj", "attn.v_proj"],
    "gpt_neox": ["attention.query_key_value"],
}


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_changed(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    at = backbone.parts.layers
    assert LoRA().names(backbone) == [f"{at}.{i}.{name}" for i in range(4) for name in LAYERS[kind]]
    keys = [name.replace("v_proj", "k_proj") for name in LAYERS[kind]]
    assert LoRA(targets="qk", layers=[-1]).names(backbone) == [f"{at}.3.{name}" for name in keys]


@pytest.mark.parametrize("adalora", [False, True])
def test_the_factors_are_those_of_peft(tiny: Callable[..., Backbone], adalora: bool) -> None:
    """The same numbers in peft's own layers give the same logits; nothing at the start."""
    backbone = tiny()
    names = LoRA().names(backbone)
    from modules.interventions import shape

    shapes = {name: shape(backbone.model, name) for name in names}
    kind = SingularFactors if adalora else Factors
    change = kind(shapes, 1, 4, 8.0 / 4, 0, torch.device("cpu"))
    ids = torch.arange(36).reshape(3, 12) + 5
    mask = torch.ones_like(ids)
    with torch.no_grad():
        before = Edited(backbone).decode(ids, mask)[0].last_hidden_state
        with low_rank(backbone.model, change.terms()):
            assert torch.equal(Edited(backbone).decode(ids, mask)[0].last_hidden_state, before)
        draw = torch.Generator().manual_seed(3)
        for leaf in change.leaves:
            leaf += 0.3 * torch.randn(leaf.shape, generator=draw)
        with low_rank(backbone.model, change.terms()):
            found = Edited(backbone).decode(ids, mask)[0].last_hidden_state
        common = {"lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
        config = AdaLoraConfig(init_r=4, total_step=100, **common) if adalora else LoraConfig(r=4, **common)
        model = get_peft_model(backbone.model, config)
        for i, name in enumerate(names):
            layer = model.base_model.model.get_submodule(name)
            if adalora:
                layer.lora_A["default"].copy_(change.a[i][0])
                layer.lora_B["default"].copy_(change.b[i][0].T)
                layer.lora_E["default"].copy_(change.e[i][0])  # type: ignore[attr-defined]
            else:
                layer.lora_A["default"].weight.copy_(change.a[i][0])
                layer.lora_B["default"].weight.copy_(change.b[i][0].T)
        expected = backbone.model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.1


def test_the_orthogonality_penalty() -> None:
    change = SingularFactors({"w": (6, 5)}, 2, 3, 1.0, 0, torch.device("cpu"))
    with torch.no_grad():
        for factor in (*change.a, *change.b):
            factor.copy_(torch.linalg.qr(factor.mT).Q.mT)
        torch.testing.assert_close(change.penalty(), torch.zeros(2), atol=1e-5, rtol=0)
        change.a[0][1] *= 2  # the second edit's: A Aᵀ - I = 3 I
        torch.testing.assert_close(change.penalty(), torch.tensor([0, 0.5 * 3 * 3**0.5 / 2]), atol=1e-5, rtol=1e-5)


def test_the_seed_is_that_of_the_start(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone = tiny()

    def factors(seed: int) -> torch.Tensor:
        with LoRA(steps=2, seed=seed).edit(backbone, [records[0].request]) as edited:
            return next(iter(edited.terms.values())).a

    assert torch.equal(factors(1), factors(1))
    assert not torch.equal(factors(1), factors(2))


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="rank"):
        LoRA(rank=0)
    with pytest.raises(ValueError, match="targets"):
        LoRA(targets="kv")  # type: ignore[arg-type]
