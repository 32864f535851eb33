"""The sentence encoder: where it comes from, what it refuses, and the real one."""

import json
import sys
from pathlib import Path

import pytest
import torch

from datamodules.records import EditRequest
from modules.memory import EditMemory, EncoderConfig, SentenceEncoder, retrieve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": " "}, "encoder.source is empty"),
        ({"max_length": 0}, "encoder.max_length must be at least 1"),
        ({"batch_size": -1}, "encoder.batch_size must be at least 1"),
    ],
)
def test_wrong_settings(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EncoderConfig(**settings)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("package:no_such_package", "pip install no-such-package"),
        ("package:os.path", "no installed package"),
        ("package:json", "holds 0 sentence encoders"),
        ("./no/such/folder", "no such folder"),
    ],
)
def test_a_source_that_is_not_there_is_refused_at_once(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SentenceEncoder(EncoderConfig(source))


def test_a_package_is_read_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "pkg_with_code"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('run')")
    (package / "model" / "modules.json").write_text("[]")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert SentenceEncoder(EncoderConfig("package:pkg_with_code")).folder == package / "model"
    assert "pkg_with_code" not in sys.modules


def test_a_folder_with_code_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither modules\.json nor config\.json"):
        SentenceEncoder(EncoderConfig(str(tmp_path)))
    file = tmp_path / "modules.json"
    file.write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "mine.Model"}]))
    with pytest.raises(ValueError, match=r"asks for mine.Model.*encoder.trust_remote_code"):
        SentenceEncoder(EncoderConfig(str(tmp_path)))
    SentenceEncoder(EncoderConfig(str(tmp_path), trust_remote_code=True))
    file.write_text("[{")
    with pytest.raises(ValueError, match=r"modules\.json cannot be read"):
        SentenceEncoder(EncoderConfig(str(tmp_path)))


def test_a_folder_is_known_by_its_content(tmp_path: Path) -> None:
    names = []
    for folder, content in (("a", "1"), ("b", "1"), ("c", "2")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(content)
        names.append(SentenceEncoder(EncoderConfig(str(tmp_path / folder))).name)
    assert names[0] == names[1] != names[2]
    shorter = EncoderConfig(str(tmp_path / "a"), max_length=8)
    assert SentenceEncoder(shorter).name == f"{names[0]} of 8 tokens"
    assert SentenceEncoder(EncoderConfig("someone/model")).name == "someone/model"


def test_a_folder_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no_such_type"}')
    with pytest.raises(ValueError, match=f"cannot load encoder '{tmp_path}'"):
        SentenceEncoder(EncoderConfig(str(tmp_path)))(["a text"])


def test_the_real_encoder(tmp_path: Path) -> None:
    encoder = SentenceEncoder()
    random = torch.get_rng_state()
    texts = ["Norway pays with the Peso.", "Lyon is a city in Japan.", "Norway pays with the Peso."]
    vectors = encoder(texts)
    assert torch.equal(torch.get_rng_state(), random)
    assert vectors.shape == (3, encoder.width) == (3, 384)
    assert vectors.dtype == torch.float32
    assert not vectors.requires_grad
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(3), atol=1e-5)
    assert torch.allclose(vectors[0], vectors[2], atol=1e-6)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        again = encoder(texts)
    assert torch.equal(again, vectors)
    assert not again.is_inference()
    assert encoder([]).shape == (0, 384)

    edits = [
        EditRequest("The currency of Norway is", "the Peso", "Norway"),
        EditRequest("The head of government of Norway is", "Elvis", "Norway"),
        EditRequest(text="Bananas are blue in winter."),
    ]
    memory = EditMemory(encoder)
    memory.add(edits)
    queries = ["What do you pay with in Norway?", "Who is prime minister in Norway?", "Which colour has a banana?"]
    found = retrieve(memory, queries)
    assert [f.request for f in found] == [edits[0], edits[1], None]
    assert memory.nearest(queries[2:], 1)[0][0][0] == edits[2]
    memory.save(tmp_path)
    loaded = EditMemory.load(tmp_path, SentenceEncoder())  # compares names; loads no model
    assert torch.equal(loaded._encoded().table, memory.vectors())

    short = SentenceEncoder(EncoderConfig(max_length=4, batch_size=2))
    assert torch.equal(short(["one two three four five"]), short(["one two six seven"]))
    with pytest.raises(ValueError, match="of 4 tokens"):
        EditMemory.load(tmp_path, short)
