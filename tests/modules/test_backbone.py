"""Backbones: loading, what is refused, and the switch that turns adapters off."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modules.backbone import (
    PARTS,
    Backbone,
    BackboneConfig,
    BackboneError,
    WithoutAdapters,
    _apply_liger,
    adapters_off,
    cast,
    load_backbone,
    load_tokenizer,
    only_adapters,
)


@pytest.mark.parametrize("kind", sorted(PARTS))
def test_parts_are_there(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = tiny(kind)
    assert len(backbone.layers) == 4
    assert (backbone.hidden_size, backbone.heads, backbone.head_dim) == (32, 4, 8)
    for layer in backbone.layers:
        attention = layer.get_submodule(backbone.parts.attention)
        attention.get_submodule(backbone.parts.keys)
        layer.get_submodule(backbone.parts.down)
    backbone.model.get_submodule(backbone.parts.norm)
    assert not backbone.model.training
    assert not any(p.requires_grad for p in backbone.model.parameters())


def test_saved_folder_loads_the_same_weights(tiny: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = tiny()
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    again = load_backbone(BackboneConfig(str(tmp_path)))
    saved = again.model.state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in backbone.model.state_dict().items())
    text = "Zürich, 東京 \n"
    assert again.tokenizer.decode(again.tokenizer(text)["input_ids"]) == text
    assert load_backbone(BackboneConfig(str(tmp_path), "bfloat16")).model.dtype == torch.bfloat16


def test_random_weights_do_not_depend_on_what_was_drawn_before(tiny_config: Callable[..., BackboneConfig]) -> None:
    # a resumed run, or an adapter's base, must find the random model that training began with
    first = load_backbone(tiny_config()).model.state_dict()
    torch.rand(7)
    state = torch.get_rng_state()
    second = load_backbone(tiny_config()).model.state_dict()
    assert all(torch.equal(first[n], t) for n, t in second.items())
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_do_not_depend_on_the_device_that_is_built_for(
    tiny_config: Callable[..., BackboneConfig],
) -> None:
    """Lightning builds within `with torch.device("cuda")`, whose generator draws others; ZeRO-3 does not."""
    first = load_backbone(tiny_config()).model.state_dict()
    with torch.device("meta"):
        second = load_backbone(tiny_config()).model.state_dict()
    assert all(torch.equal(first[n], t) for n, t in second.items())


def test_a_cast_spares_the_rotary_frequencies(tiny: Callable[..., Backbone]) -> None:
    model = tiny(tie_word_embeddings=True).model
    frequencies = model.base_model.rotary_emb.inv_freq.clone()
    cast(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.base_model.rotary_emb.inv_freq, frequencies)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight  # still one


def test_liger_leaves_the_keys_as_they_are(tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rotation writes into them, and gists keep them from before it."""
    import liger_kernel.transformers as liger

    told: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(liger, "_apply_liger_kernel_to_instance", lambda **options: told.update(options))
    _apply_liger(tiny().model)
    assert told["rope"] is False
    assert "rope" in inspect.signature(liger.apply_liger_kernel_to_qwen2).parameters


def test_missing_sources_are_named(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "nowhere")
    for source in ("gguf:no_such_package", f"gguf:{nowhere}.gguf", nowhere, str(tmp_path)):
        with pytest.raises(ValueError, match="no_such_package|nowhere|" + tmp_path.name):
            load_backbone(BackboneConfig(source))


@pytest.mark.parametrize(
    ("kind", "overrides", "missing"),
    [
        ("llama", {}, "hidden_size and num_hidden_layers"),
        ("llama", {"vocab_size": 300, "hidden_size": 64}, "num_hidden_layers"),
        ("gpt2", {"n_layer": 2}, "hidden_size"),
    ],
)
def test_a_random_model_is_never_of_its_types_own_size(
    kind: str, overrides: dict[str, Any], missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", None)  # nothing is built
    with pytest.raises(BackboneError, match=rf"random:{kind}.* backbone.overrides {missing}, "):
        load_backbone(BackboneConfig(f"random:{kind}", overrides=overrides))


def test_unsupported_types_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"random:bert.*llama"):
        load_backbone(BackboneConfig("random:bert"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = AutoConfig.for_model("gemma", vocab_size=257, num_key_value_heads=1, head_dim=8, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    load_tokenizer(BackboneConfig("random:llama")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*gemma"):
        load_backbone(BackboneConfig(str(tmp_path)))
    # no causal language model at all
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=tmp_path.name):
        load_backbone(BackboneConfig(str(tmp_path)))


def test_missing_or_misshapen_weights_are_named(tiny: Callable[..., Backbone], tmp_path: Path) -> None:
    backbone = tiny()
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    gone = "model.layers.1.self_attn.k_proj.weight"
    save_file({n: t for n, t in whole.items() if n != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*{gone}"):
        load_backbone(BackboneConfig(str(tmp_path)))
    save_file(whole | {gone: whole[gone][:3].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=tmp_path.name):
        load_backbone(BackboneConfig(str(tmp_path)))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=tmp_path.name):
        load_backbone(BackboneConfig(str(tmp_path)))


def test_config_is_checked() -> None:
    with pytest.raises(ValueError, match=r"backbone\.dtype.*int8"):
        BackboneConfig(dtype="int8")
    with pytest.raises(ValueError, match=r"backbone\.source is empty"):
        BackboneConfig(" ")


def test_remote_code_is_never_asked_for_by_itself(tiny: Callable[..., Backbone], tmp_path: Path, monkeypatch) -> None:
    backbone = tiny()
    backbone.model.save_pretrained(tmp_path)
    backbone.tokenizer.save_pretrained(tmp_path)
    asked = []
    plain = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM,
        "from_pretrained",
        lambda *a, **k: (asked.append(k["trust_remote_code"]), plain(*a, **k))[1],
    )
    load_backbone(BackboneConfig(str(tmp_path)))
    load_backbone(BackboneConfig(str(tmp_path), trust_remote_code=True))
    assert asked == [False, True]


def test_a_backbone_without_adapters_decodes_as_the_original(tiny: Callable[..., Backbone]) -> None:
    adapted = tiny()
    original = WithoutAdapters(adapted.model, adapted.tokenizer, adapted.config)
    ids = torch.arange(10)[None]
    before = adapted.decode(input_ids=ids).last_hidden_state
    torch.testing.assert_close(adapted.logits(before), adapted.model(ids).logits)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), adapted.model)
    assert not torch.equal(adapted.decode(input_ids=ids).last_hidden_state, before)
    assert torch.equal(original.decode(input_ids=ids).last_hidden_state, before)
    assert not torch.equal(adapted.decode(input_ids=ids).last_hidden_state, before)


def test_adapters_alone_are_trained_in_32_bits(tiny: Callable[..., Backbone]) -> None:
    model = tiny().model.to(torch.bfloat16).requires_grad_(True)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"]), model)
    only_adapters(model)
    kinds = {("lora_" in n, p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    assert kinds == {(True, True, torch.float32), (False, False, torch.bfloat16)}


def test_adapters_off_gives_the_original_and_keeps_gradients(tiny: Callable[..., Backbone]) -> None:
    model = tiny().model
    ids = torch.arange(10)[None]
    before = model(ids).logits
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False), model)
    assert not torch.equal(model(ids).logits, before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="inside"), adapters_off(model):  # noqa: PT012 (what is inside raises on purpose)
        assert torch.equal(model(ids).logits, before)
        raise RuntimeError("inside")
    assert not torch.equal(model(ids).logits, before)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
