"""Edits in and out of a memory, and the three ways of finding them."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from fake_encoder import FakeEncoder

from datamodules.records import EditRequest
from modules.memory import EditMemory

LYON = EditRequest("Lyon is in", "Japan", "Lyon")
MAYOR = EditRequest("The mayor of Lyon is", "Bob", "Lyon")
BAND = EditRequest("AC/DC plays", "jazz", "AC/DC")
TEXT = EditRequest(text="The currency of Norway is the Peso.")
NAMELESS = EditRequest("The largest planet is", "Mars")
ALL = [LYON, MAYOR, BAND, TEXT, NAMELESS]


def memory_of(requests: Sequence[EditRequest], **aliases: Sequence[str]) -> EditMemory:
    memory = EditMemory(FakeEncoder())
    memory.add(requests, aliases)
    return memory


def state(memory: EditMemory) -> tuple[object, ...]:
    """All that a memory can answer from, in an order of its own."""
    names, edits = memory._subjects._names, memory._subjects._edits
    vectors = dict(zip([r.statement for r in memory.requests], memory.vectors().tolist(), strict=True))
    subjects = {subject: set(keys) for subject, keys in edits.items()}
    return {(e.request, frozenset(e.aliases)) for e in memory.entries}, names, subjects, vectors


def made_up(count: int, seed: int) -> list[EditRequest]:
    """Distinct edits whose subjects share words."""
    draw = random.Random(seed)
    subjects = [
        "New York",
        "York",
        "New York City",
        "Apple",
        "Pineapple Hill",
        "AC/DC",
        "Curaçao",
        "東京",
        "京都",
        None,
    ]
    relations = ["{} is in", "The mayor of {} is", "{} was founded by", "{} is twinned with"]
    made = {}
    while len(made) < count:
        subject = draw.choice(subjects)
        prompt = draw.choice(relations).format(subject or f"Something {len(made)}")
        made[prompt] = EditRequest(prompt, f"Land {draw.randint(0, 9)}", subject)
    return list(made.values())


def test_exact_is_subject_and_relation() -> None:
    memory = memory_of(ALL)
    assert memory.exact("Lyon is in") == LYON
    assert memory.exact(" lyon  is IN:") == LYON
    assert memory.exact("Lyon is in the") is None
    assert memory.exact("Is Lyon in") is None
    assert memory.exact(NAMELESS.prompt) is None  # no subject
    assert memory.exact("") is None


def test_exact_where_the_prompt_writes_the_subject_otherwise() -> None:
    edit = EditRequest("What language is GTK+ written in?", "Rust", "GTK")
    memory = memory_of([edit])
    assert memory.of_subject(edit.prompt) == ()
    assert memory.exact("What language is GTK+ written in") == edit


def test_an_alias_stands_for_its_subject() -> None:
    memory = memory_of([LYON], Lyon=["Lugdunum", "the Capital of Lights"])
    memory.add([MAYOR])
    assert memory.exact("Lugdunum is in") == LYON
    assert memory.exact("The mayor of the Capital of Lights is") == MAYOR  # the alias is the subject's, not the edit's
    assert memory.of_subject("Who lived in Lugdunum?") == (LYON, MAYOR)
    memory.remove([LYON])  # and goes with the edit that it came with
    assert memory.of_subject("Who lived in Lugdunum?") == ()
    assert memory.of_subject("Who lived in Lyon?") == (MAYOR,)


def test_one_alias_of_two_subjects_finds_both() -> None:
    one, two = (
        EditRequest("Paul Simon sings", "rap", "Paul Simon"),
        EditRequest("Neil Simon wrote", "code", "Neil Simon"),
    )
    memory = EditMemory()
    memory.add([one, two], {"Paul Simon": ["Simon"], "Neil Simon": ["Simon"]})
    assert memory.of_subject("Who is Simon?") == (one, two)
    assert memory.of_subject("Who is Neil Simon?") == (two,)  # the longer name is one alone


@pytest.mark.parametrize("aliases", [{"Oslo": ["Christiania"]}, {"": ["x"]}, {"Lyon": ["ok", " "]}])
def test_wrong_aliases_are_refused_before_anything_is_added(aliases: dict[str, list[str]]) -> None:
    memory = memory_of([BAND])
    before = state(memory)
    with pytest.raises(ValueError, match="aliases of"):
        memory.add([LYON, TEXT], aliases)
    assert state(memory) == before


def test_the_same_statement_is_kept_once() -> None:
    memory = memory_of([LYON], Lyon=["Lugdunum"])
    memory.add([LYON, TEXT, TEXT, LYON])
    assert memory.requests == (LYON, TEXT)
    assert memory.of_subject("Lugdunum") == (LYON,)
    memory.add([EditRequest(LYON.prompt, LYON.target)])  # told again without its subject
    assert memory.of_subject("Lyon") == memory.of_subject("Lugdunum") == ()


def test_a_later_target_takes_the_earlier_ones_place() -> None:
    memory = memory_of(ALL, Lyon=["Lugdunum"])
    memory.vectors()
    peru = EditRequest("lyon is in", "Peru", "Lyon")
    memory.add([peru])
    assert memory.requests == (peru, *ALL[1:])
    assert memory.exact("Lyon is in") == memory.exact("Lugdunum is in") == peru
    assert LYON not in memory
    assert memory.nearest([peru.statement], 1)[0][0] == (peru, pytest.approx(1))
    memory.remove([peru])
    assert memory.exact("Lyon is in") is None  # what was replaced does not come back
    assert memory.of_subject("Lyon") == (MAYOR,)


def test_a_subject_goes_with_its_last_edit() -> None:
    memory = memory_of(ALL)
    memory.remove([LYON])
    assert memory.of_subject("Lyon") == (MAYOR,)
    memory.remove([MAYOR, BAND])
    assert memory.of_subject("Lyon and AC/DC") == ()
    assert memory.requests == (TEXT, NAMELESS)


def test_removing_what_is_not_there_is_refused_before_anything_is_removed() -> None:
    memory = memory_of(ALL)
    before = state(memory)
    with pytest.raises(ValueError, match=r"not in the memory: 'Lyon is in Peru\.'"):
        memory.remove([BAND, replace(LYON, target="Peru")])
    assert state(memory) == before


def test_nearest_sorts_by_cosine() -> None:
    memory = memory_of(ALL)
    queries = ["Norway's currency is", "Lyon is in", "planet"]
    [some, *others] = memory.nearest(queries, 3)
    assert some[0][0] == TEXT
    assert others[0][0][0] == LYON
    assert others[1][0][0] == NAMELESS
    encoder = FakeEncoder()
    for query, near in zip(queries, [some, *others], strict=True):
        cosines = (encoder([r.statement for r in ALL]) @ encoder([query])[0]).tolist()
        expected = sorted(zip(ALL, cosines, strict=True), key=lambda pair: -pair[1])[:3]
        assert [r for r, _ in near] == [r for r, _ in expected]
        assert [c for _, c in near] == pytest.approx([c for _, c in expected], abs=1e-6)


def test_nearest_among_given_edits() -> None:
    memory = memory_of(ALL)
    found = memory.nearest(["Lyon is in", "Lyon is in", "Lyon"], 2, among=[[TEXT, BAND, MAYOR], [BAND], []])
    assert [[request for request, _ in near] for near in found] == [[MAYOR, TEXT], [BAND], []]
    with pytest.raises(ValueError, match="not in the memory"):
        memory.nearest(["Lyon"], 1, among=[[replace(LYON, target="Peru")]])
    assert memory.nearest([], 1) == []
    assert [len(near) for near in memory.nearest(["Lyon"], 99)] == [len(ALL)]
    assert EditMemory(FakeEncoder()).nearest(["Lyon"], 1) == [[]]
    with pytest.raises(ValueError, match="k must be at least 1"):
        memory.nearest(["Lyon"], 0)


def test_equally_near_edits_come_in_their_order() -> None:
    same = [EditRequest(f"A{'!' * i} is", "B", None, f"Equal {'x' * 9}") for i in range(5)]
    memory = memory_of([*same, LYON])
    assert [request for request, _ in memory.nearest(["Equal xxxxxxxxx"], 3)[0]] == same[:3]


def test_only_what_is_compared_is_encoded_and_only_once() -> None:
    encoder = FakeEncoder()
    memory = EditMemory(encoder)
    memory.add(ALL)
    assert memory.exact("Lyon is in"), memory.of_subject("Lyon")
    assert not encoder.asked
    memory.nearest(["q"], 1, among=[[LYON, MAYOR]])
    assert encoder.asked == [[LYON.statement, MAYOR.statement], ["q"]]
    memory.nearest(["r"], 1)
    memory.add([replace(LYON, subject=None), replace(MAYOR, target="Eve")])
    memory.nearest(["s"], 1)
    assert encoder.asked[2:] == [[r.statement for r in ALL[2:]], ["r"], ["The mayor of Lyon is Eve."], ["s"]]


def test_without_an_encoder_only_nearness_is_refused() -> None:
    memory = EditMemory()
    memory.add(ALL)
    assert memory.exact("Lyon is in") == LYON
    for ask in (lambda: memory.nearest(["Lyon"], 1), memory.vectors):
        with pytest.raises(ValueError, match="no encoder"):
            ask()


def test_adding_then_removing_leaves_an_equal_memory() -> None:
    for seed in range(5):
        draw = random.Random(seed)
        requests = made_up(24, seed)
        kept, gone = requests[:12], requests[12:]
        memory = memory_of(kept, **({"York": ["Eboracum"]} if any(r.subject == "York" for r in kept) else {}))
        before = state(memory)
        subject = next(r.subject for r in gone if r.subject)
        memory.add(gone, {subject: ["Some alias", "Another"]})
        memory.nearest(["Apple"], 2)
        draw.shuffle(gone)
        for request in gone:
            memory.remove([request])
        assert state(memory) == before
        assert memory.requests == tuple(kept)
    memory.remove(kept)
    assert state(memory) == state(EditMemory(FakeEncoder()))


def test_the_order_of_adding_does_not_matter() -> None:
    requests = made_up(24, 7)
    one = memory_of(requests)
    for seed in range(3):
        mixed = random.Random(seed).sample(requests, len(requests))
        other = memory_of(mixed[:10])
        other.vectors()
        other.add(mixed[10:])
        assert state(other) == state(one)
        queries = [r.prompt for r in requests] + ["The mayor of New York City is", "東京都", "apple pie"]
        for query in queries:
            assert set(other.of_subject(query)) == set(one.of_subject(query))
            assert other.exact(query) == one.exact(query)
        assert [n[0][0] for n in other.nearest(queries, 1)] == [n[0][0] for n in one.nearest(queries, 1)]


def test_rows_of_removed_edits_are_given_back() -> None:
    requests = [EditRequest(f"Town {i} is in", f"Land {i}", f"Town {i}") for i in range(300)]
    memory = memory_of(requests)
    memory.vectors()
    memory.remove(requests[:250])
    assert len(memory._entries) < 2 * 50 + 65
    assert memory.requests == tuple(requests[250:])
    assert state(memory) == state(memory_of(requests[250:]))
    memory.add(requests[:3])
    assert [r for r, _ in memory.nearest([requests[1].statement], 1)[0]] == [requests[1]]
    assert memory.of_subject("Town 260") == (requests[260],)


def test_a_copy_is_of_its_own() -> None:
    memory = memory_of(ALL, Lyon=["Lugdunum"])
    memory.vectors()
    before = state(memory)
    other = memory.copy()
    assert state(other) == before
    other.add([EditRequest("Lyon is in", "Peru", "Lyon"), EditRequest("Oslo is in", "Chad", "Oslo")])
    other.remove([BAND])
    other.vectors()
    assert state(memory) == before
    memory.remove([MAYOR])
    assert other.of_subject("Lugdunum")[1] == MAYOR


def test_vectors_made_in_inference_mode_and_under_autocast() -> None:
    memory = memory_of(ALL[:2])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = memory.nearest(["Lyon is in"], 2)
        among = memory.nearest(["Lyon is in"], 2, among=[ALL[:2]])
    memory.add(ALL[2:])
    for near in (inside, among, memory.nearest(["Lyon is in"], 2)):
        assert near == [[(LYON, pytest.approx(0.836344, abs=2e-6)), (MAYOR, pytest.approx(0.536804, abs=2e-6))]]
    assert memory.vectors().shape == (5, 64)
