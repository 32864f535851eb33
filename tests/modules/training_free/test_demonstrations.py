"""Which training edits are shown, and how, on hand-made records."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bag_of_words import BagOfWords, training_edit, written

from datamodules.records import EditRequest, Query
from modules.memory import EditMemory
from modules.training_free import demonstrations as module
from modules.training_free.demonstrations import Demonstrations, encoded, fact

EDIT = EditRequest("Lyon is in", "Japan", "Lyon")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def memory(*requests: EditRequest) -> EditMemory:
    made = EditMemory(BagOfWords())
    made.add(requests or [EDIT])
    return made


def corpus(tmp_path: Path, *records: Any, kinds: Any = ("update",), seed: int = 0) -> Demonstrations:
    return Demonstrations(written(tmp_path / "train.jsonl", records), BagOfWords(), kinds, seed)


def test_the_nearest_stand_last_each_in_its_kind(tmp_path: Path) -> None:
    found = corpus(
        tmp_path,
        training_edit("Gold", "costs", "ten"),
        training_edit("Rome", target="Japan"),
        training_edit("Oslo"),
        kinds=("copy", "update", "retain"),
    )
    (shown,) = found.of([EDIT], [[("update",), ("retain",), ("copy",)]], memory())
    assert shown == (
        "New Fact: Gold costs ten\nPrompt: Gold costs ten\n\n",
        "New Fact: Oslo is in Peru\nPrompt: Next to Oslo lies Chile\n\n",
        "New Fact: Rome is in Japan\nPrompt: They say Rome is in Japan\n\n",
    )
    shown, none = found.of([EDIT, EDIT], [[("copy", "retain")] * 2, []], memory())
    assert shown == (
        "New Fact: Oslo is in Peru\nPrompt: Oslo is in Peru\n\n",
        "New Fact: Oslo is in Peru\nPrompt: Next to Oslo lies Chile\n\n",
        "New Fact: Rome is in Japan\nPrompt: Rome is in Japan\n\n",
        "New Fact: Rome is in Japan\nPrompt: Next to Rome lies Chile\n\n",
    )
    assert none == ()


def test_a_fact_has_no_full_stop_of_its_own() -> None:
    assert fact(EDIT) == "Lyon is in Japan"
    assert fact(EditRequest(text="Lyon has moved.")) == "Lyon has moved."


def test_edited_subjects_are_never_shown(tmp_path: Path) -> None:
    neighbours = {"near": (Query("Next to Lyon lies", ("Chile",)), Query("Far from Nara lies", ("Chad",)))}
    found = corpus(
        tmp_path,
        training_edit("LYON"),  # the subject in another case
        training_edit("It", requests=(EditRequest("Lyon lies in", "Chad"),)),  # no subject is known
        training_edit("the mayor", "of Lyon is", "Ada"),  # named beside another subject
        training_edit("Kyoto", rephrases=(Query("Unlike Lyon, Kyoto is in", ("Peru",)),)),
        training_edit("Nara", locality=neighbours),
        kinds=("update", "retain"),
    )
    plans = [[("update",)] * 9, [("retain",)] * 9]
    updates, retains = found.of([EDIT, EDIT], plans, memory())
    assert updates == ("New Fact: Nara is in Peru\nPrompt: They say Nara is in Peru\n\n",)
    assert sorted(retains) == [
        "New Fact: Kyoto is in Peru\nPrompt: Next to Kyoto lies Chile\n\n",
        "New Fact: Nara is in Peru\nPrompt: Far from Nara lies Chad\n\n",
    ]
    assert found.of([EDIT], plans[:1], memory(EDIT, EditRequest("Nara is in", "Chad", "Nara"))) == [()]


def test_many_edited_subjects_among_the_nearest_do_not_use_up_the_demonstrations(tmp_path: Path) -> None:
    near = [training_edit(f"City {i}") for i in range(module.SPARE * 3)]
    far = [training_edit(f"Gold {i}", "costs so much:", "ten") for i in range(3)]
    found = corpus(tmp_path, *near, *far)
    (shown,) = found.of([EDIT], [[("update",)] * 4], memory(EDIT, *(record.request for record in near)))
    assert len(shown) == 3
    assert all("costs" in text for text in shown)


def test_only_records_of_one_edit_with_what_is_needed(tmp_path: Path) -> None:
    two = (EditRequest("Rome is in", "Peru", "Rome"), EditRequest("Oslo is in", "Peru", "Oslo"))
    records = [training_edit("A", requests=two), training_edit("B", rephrases=()), training_edit("C", locality={})]
    assert len(corpus(tmp_path, *records, training_edit("D"))) == 2
    assert len(corpus(tmp_path, *records, training_edit("D"), kinds=("copy", "retain"))) == 2
    with pytest.raises(ValueError, match=r"no record .*records .*train.jsonl.* rephrases and locality queries"):
        corpus(tmp_path, *records, kinds=("update", "retain", "update"))


def test_rephrases_are_drawn_by_seed_and_record(tmp_path: Path) -> None:
    many = tuple(Query(f"Wording {i}: Rome is in", ("Peru",)) for i in range(20))
    record = training_edit("Rome", rephrases=many)
    shown = set()
    for seed in range(8):
        one, again = (
            corpus(tmp_path, *records, seed=seed).of([EDIT], [[("update",)]], memory())
            for records in ([record], [training_edit("Gold", "costs"), record])
        )
        assert one == again
        shown.add(one[0])
    assert len(shown) > 3


def test_vectors_are_made_once_and_kept(cache: Path) -> None:
    encoder, texts = BagOfWords(), ["a b", "c", "a b c"]
    first = encoded(encoder, texts, "things")
    assert encoder.texts == texts
    assert torch.equal(encoded(encoder, texts, "things"), first)
    assert encoder.texts == texts
    assert torch.equal(first, BagOfWords()(texts))
    encoded(encoder, texts[:2], "things")
    assert len(encoder.texts) == 5
    other = BagOfWords()
    other.name = "another"  # type: ignore[misc]
    encoded(other, texts, "things")
    assert other.texts == texts
    files = sorted(cache.glob("things-*.safetensors"))
    assert len(files) == 3
    for file in files:
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"cannot be read.*remove it"):
        encoded(encoder, texts, "things")
