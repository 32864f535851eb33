"""What counts as the same word, and which phrases stand in a text."""

import random
import re
import unicodedata

import pytest

from modules.memory.phrases import PhraseIndex
from modules.memory.words import fold, words


def found(subjects: list[str], text: str) -> list[str]:
    index = PhraseIndex[str]()
    for subject in subjects:
        index.add(subject, subject)
    return [owner for span in index.find(words(text)) for owner in span.owners]


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("Lyon", "Lyon's mayor is"),
        ("Lyon", "the mayor of (Lyon), and of “Lyon”."),
        ("Lyon", "Lyon’s mayor"),
        ("Lyon", "a Lyon-based firm"),
        ("Lyon", "Where is lyon?"),
        ("Lyon", "WHERE IS LYON?"),
        ("AC/DC", "The singer of AC/DC is"),
        ("AC/DC", "ac/dc's singer"),
        ("2001: A Space Odyssey", "Who directed 2001: A Space Odyssey?"),
        ("Jean-Luc Godard", "films by Jean‑Luc Godard"),  # a hyphen that does not break
        ("Jean-Luc Godard", "films by Jean Luc Godard"),
        ("Conan O'Brien", "a show of Conan O’Brien"),
        ("Washington, D.C.", "a street in Washington, D.C."),
        ("Curaçao", "the isle of Curac\u0327ao"),
        ("Straße", "DIE STRASSE"),
        ("ＮＥＣ Corporation", "NEC Corporation makes"),
        ("C++", "C++ was made by"),
        ("!!!", "the band !!! plays"),
        ("iOS 5", "What is new in iOS 5?"),
        ("東京", "東京都の知事は"),
        ("서울", "서울의 인구는"),
        ("กรุงเทพ", "เมืองหลวงคือกรุงเทพมหานคร"),
        ("リヨン", "リヨン市の市長は"),
        ("हिन्दी", "भाषा हिन्दी है"),
        ("Zürich", "Zu\u0308rich\u00ad liegt in"),  # a soft hyphen
        ("Winnie-the-Pooh", "who wrote winnie the pooh"),
    ],
)
def test_a_subject_is_found(subject: str, text: str) -> None:
    assert subject in found([subject], text)


@pytest.mark.parametrize(
    ("subject", "text"),
    [
        ("apple", "pineapple, apples and applesauce"),
        ("Lyon", "The Lyonnais"),
        ("C", "C++ and C# were made by"),
        ("iOS 5", "What is new in iOS 5.1?"),
        ("227", "the number 10,227"),
        ("Paris Texas", "It is not Paris. Texas is far."),
        ("Curaçao", "the isle of Curacao"),
        ("アメリカ", "ラテンアメリカ"),  # a run of katakana is one word
        ("हिन", "हिन्दी"),  # vowel signs belong to their letters
        ("ก", "กำ"),
        ("New York City", "New York"),
    ],
)
def test_a_subject_is_not_found(subject: str, text: str) -> None:
    assert not found([subject], text)


def test_case_counts_where_it_tells_words_apart() -> None:
    assert not found(["US"], "tell us more")
    assert not found(["WHO"], "Who leads the country?")
    assert not found(["It"], "where is it")
    assert not found(["Friends"], "In Paris he met friends")
    assert not found(["The Game"], "After the game Germany won")
    assert found(["The Beatles"], "When did Ringo join the Beatles?") == ["The Beatles"]
    assert found(["Friends"], "who plays in friends") == ["Friends"]  # no capital to go by
    assert found(["Osmium"], "When was osmium discovered?") == ["Osmium"]
    assert found(["osmium"], "Is Osmium a metal?") == ["osmium"]
    assert found(["US", "us"], "the US and us") == ["US", "us"]


def test_the_longest_of_overlapping_subjects_wins() -> None:
    subjects = ["York", "New York", "New York City", "City of London"]
    assert found(subjects, "the New York City mayor") == ["New York City"]
    assert found(subjects, "New York and York") == ["New York", "York"]
    assert found(subjects, "New York City of London") == ["New York", "City of London"]
    assert set(found(["Aab Bab", "Bab Aab"], "Aab Bab Aab")) == {"Aab Bab", "Bab Aab"}  # neither is longer


def test_removing_phrases_leaves_nothing() -> None:
    index = PhraseIndex[str]()
    index.add("New York", "city")
    before = index.copy()
    index.add("New York", "state")
    index.add("NEW YORK", "city")
    index.add("York", "york")
    for phrase, owner in (("York", "york"), ("NEW YORK", "city"), ("New York", "state")):
        index.remove(phrase, owner)
    assert index == before
    index.remove("New York", "city")
    assert index == PhraseIndex[str]()
    assert before.find(words("New York"))  # a copy is of its own


def test_words_of_random_text_are_stable() -> None:
    draw = random.Random(0)
    letters = "aBéßÇ #+-.,'’/5٣東京アー한กำ\u0301\u200d—\n"
    for _ in range(500):
        text = "".join(draw.choices(letters, k=draw.randint(0, 12)))
        assert fold(words(unicodedata.normalize("NFD", text))) == fold(words(text))
        assert fold(fold(words(text))) == fold(words(text))
        assert words(f"  {text}\t") == words(text)


def test_what_is_found_is_what_a_regular_expression_finds() -> None:
    """On plain ASCII: whole words, any case; an own case always counts."""
    draw = random.Random(1)
    syllables = ["ap", "ple", "pine", "ly", "on", "york"]

    def phrase() -> str:
        return " ".join("".join(draw.choices(syllables, k=draw.randint(2, 3))) for _ in range(draw.randint(1, 2)))

    hits = 0
    for _ in range(400):
        subjects = list({phrase() for _ in range(6)})
        signs = [" ", " ", ", ", "'s ", ". ", " (", "/"]
        text = "".join(phrase() + draw.choice(signs) for _ in range(8))
        pattern = {s: re.compile(rf"(?<!\w){re.escape(s)}(?!\w)") for s in subjects}
        expected = {s for s in subjects if pattern[s].search(text)}
        got = set(found(subjects, text))
        assert got <= expected
        hidden = expected - got  # only under a longer one
        assert all(any((h in g and h != g) or _crosses(h, g) for g in got) for h in hidden)
        hits += len(got)
    assert hits > 100


def _crosses(a: str, b: str) -> bool:
    """Whether the end of one is the beginning of the other."""
    return bool(set(a.split()) & set(b.split())) and len(b.replace(" ", "")) > len(a.replace(" ", ""))
