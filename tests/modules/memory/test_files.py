"""A memory as files: equal again, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_encoder import FakeEncoder
from safetensors.torch import load_file, save_file

from datamodules.records import EditRequest
from modules.memory import EditMemory

EDITS = [
    EditRequest("Lyon is in", "Japan", "Lyon", old_target="France", fact=("Q1", "Q2")),
    EditRequest("Curaçao lies in", "日本", "Curaçao"),
    EditRequest(text="The currency of Norway is the Peso."),
    EditRequest("The largest planet is", "Mars"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    memory = EditMemory(FakeEncoder())
    memory.add([EDITS[0], EditRequest("Oslo is in", "Chad", "Oslo"), *EDITS[1:]], {"Lyon": ["Lugdunum"]})
    memory.remove([EditRequest("Oslo is in", "Chad", "Oslo")])
    memory.save(tmp_path / "memory")
    return tmp_path / "memory"


def test_round_trip_encodes_nothing(folder: Path, tmp_path: Path) -> None:
    encoder = FakeEncoder()
    memory = EditMemory.load(folder, encoder)
    assert memory.requests == tuple(EDITS)
    assert memory.of_subject("Lugdunum") == (EDITS[0],)
    assert torch.equal(memory.vectors(), FakeEncoder()([r.statement for r in EDITS]))
    memory.save(tmp_path / "again")
    assert not encoder.asked
    for file in ("memory.json", "memory.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (folder / file).read_bytes()
    memory.add([EditRequest("Oslo is in", "Chad", "Oslo")])  # and it goes on from there
    memory.nearest(["Oslo"], 1)
    assert encoder.asked == [["Oslo is in Chad."], ["Oslo"]]


def test_an_empty_memory_and_one_without_an_encoder(tmp_path: Path) -> None:
    EditMemory(FakeEncoder()).save(tmp_path / "empty")
    assert EditMemory.load(tmp_path / "empty", FakeEncoder()).nearest(["x"], 1) == [[]]
    plain = EditMemory()
    plain.add(EDITS)
    plain.save(tmp_path / "plain")
    assert not (tmp_path / "plain" / "memory.safetensors").exists()
    assert EditMemory.load(tmp_path / "plain").requests == tuple(EDITS)
    encoder = FakeEncoder()
    memory = EditMemory.load(tmp_path / "plain", encoder)  # encoded when asked for
    assert memory.nearest(["Norway's currency"], 1)[0][0][0] == EDITS[2]


def test_without_an_encoder_the_vectors_are_not_needed(folder: Path) -> None:
    assert EditMemory.load(folder).exact("lugdunum is in") == EDITS[0]


def test_vectors_of_another_encoder_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="holds vectors of the encoder 'fake', not of 'other'"):
        EditMemory.load(folder, FakeEncoder("other"))


def _told(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "memory.json"
        told = json.loads(file.read_text(encoding="utf-8"))
        change(told)
        file.write_text(json.dumps(told), encoding="utf-8")

    return damage


def _vectors(change: Callable[[torch.Tensor], torch.Tensor], name: str = "vectors") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        from safetensors import safe_open

        file = folder / "memory.safetensors"
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({name: change(load_file(file)["vectors"]).contiguous()}, file, metadata)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "memory.json").unlink(), "holds no edit memory"),
        (lambda f: (f / "memory.json").write_text('{"version": 1, "edits": ['), "memory.json cannot be read"),
        (_told(lambda t: t.pop("edits")), "memory.json cannot be read: KeyError 'edits'"),
        (_told(lambda t: t["edits"][0]["request"].update(prompt=5)), "memory.json cannot be read"),
        (_told(lambda t: t["edits"][0]["request"].update(colour="red")), "memory.json cannot be read: TypeError"),
        (_told(lambda t: t.update(version=7)), "of version 7, not 1"),
        (_told(lambda t: t["edits"].pop()), "vectors of other edits"),
        (_told(lambda t: t["edits"].reverse()), "vectors of other edits"),
        (_told(lambda t: t["edits"].append(t["edits"][0])), "vectors of other edits"),
        (lambda f: (f / "memory.safetensors").unlink(), "has no memory.safetensors"),
        (lambda f: (f / "memory.safetensors").write_bytes(b"\0" * 100), "memory.safetensors cannot be read"),
        (_vectors(lambda v: v, "others"), "memory.safetensors cannot be read"),
        (_vectors(lambda v: v[:2]), "vectors of other edits"),
        (_vectors(lambda v: v * 0), "not of length 1"),
        (_vectors(lambda v: v * torch.nan), "not of length 1"),
    ],
)
def test_damage_is_named(folder: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        EditMemory.load(folder, FakeEncoder())


def test_an_edit_twice_in_a_file_without_vectors_is_refused(tmp_path: Path) -> None:
    plain = EditMemory()
    plain.add(EDITS)
    plain.save(tmp_path)
    _told(lambda t: t["edits"].append(t["edits"][0]))(tmp_path)
    with pytest.raises(ValueError, match="holds an edit twice"):
        EditMemory.load(tmp_path)
