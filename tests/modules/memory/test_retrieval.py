"""Ret(q) and its four cases."""

import random
import re

import pytest
from fake_encoder import FakeEncoder

from datamodules.records import EditRequest
from modules.memory import EditMemory, Retrieved, retrieve

LYON = EditRequest("Lyon is in", "Japan", "Lyon")
MAYOR = EditRequest("The mayor of Lyon is", "Bob", "Lyon")
OSLO = EditRequest("Oslo is the capital of", "Chad", "Oslo")
NAMELESS = EditRequest("The largest planet is", "Mars")


def memory_of(*requests: EditRequest) -> EditMemory:
    memory = EditMemory(FakeEncoder())
    memory.add(requests)
    return memory


def test_each_case() -> None:
    memory = memory_of(LYON, MAYOR, OSLO, NAMELESS)
    queries = [
        "Lyon is in",  # although two edits have its subject
        "Who governs Oslo's harbour?",
        "The name of the mayor that Lyon has is",
        "The harbour of Bergen",
        "Of Oslo and Lyon, which is the capital of a country? Oslo is the capital of",
        "The largest planet is",  # an edit without a subject is matched by none
    ]
    expected = [
        Retrieved(LYON, "exact"),
        Retrieved(OSLO, "subject"),
        Retrieved(MAYOR, "ambiguous"),
        Retrieved(None, "unmatched"),
        Retrieved(OSLO, "ambiguous"),
        Retrieved(None, "unmatched"),
    ]
    assert retrieve(memory, queries) == expected
    assert [memory.retrieve(query) for query in queries] == [found.request for found in expected]


def test_all_ambiguous_queries_are_encoded_at_once_and_no_others() -> None:
    memory = memory_of(LYON, MAYOR, OSLO)
    encoder = memory.encoder
    assert isinstance(encoder, FakeEncoder)
    ambiguous = ["Where is Lyon?", "Who rules Lyon?"]
    retrieve(memory, ["Lyon is in", ambiguous[0], "Oslo", ambiguous[1], "Bergen"])
    assert encoder.asked == [[LYON.statement, MAYOR.statement], ambiguous]


def test_no_encoder_is_needed_where_nothing_is_ambiguous() -> None:
    memory = EditMemory()
    memory.add([LYON, MAYOR, OSLO])
    assert [r.case for r in retrieve(memory, ["Lyon is in", "Oslo's king", "Bergen"])] == [
        "exact",
        "subject",
        "unmatched",
    ]
    with pytest.raises(ValueError, match="no encoder"):
        retrieve(memory, ["Lyon's king"])
    assert retrieve(EditMemory(), ["Lyon", ""]) == [Retrieved(None, "unmatched")] * 2


def test_a_query_without_a_subject_in_whole_words_retrieves_nothing() -> None:
    """Against a regular expression that knows nothing of the index."""
    draw = random.Random(0)
    parts = ["apple", "pine", "ap", "york", "new", "is", "s", "ly", "on"]

    def word() -> str:
        made = "".join(draw.choices(parts, k=draw.randint(1, 3)))
        return draw.choice([made, made.title(), made.upper()])

    cases = {"matched": 0, "unmatched": 0}
    for _ in range(60):
        subjects = [" ".join(word() for _ in range(draw.randint(1, 2))) for _ in range(8)]
        memory = memory_of(*(EditRequest(f"Home {i} of {s} is", word(), s) for i, s in enumerate(subjects)))
        queries = ["".join(word() + draw.choice([" ", ", ", "'s ", "? "]) for _ in range(6)) for _ in range(10)]
        for query, found in zip(queries, retrieve(memory, queries), strict=True):
            named = [s for s in subjects if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", query, re.IGNORECASE)]
            if found.request is None:
                assert found.case == "unmatched"
                own = [s for s in subjects if re.search(rf"(?<!\w){re.escape(s)}(?!\w)", query)]
                assert not own  # written as the edit writes it, a subject is always found
            else:
                assert found.request.subject in named
            cases["unmatched" if found.request is None else "matched"] += 1
    assert min(cases.values()) > 50
