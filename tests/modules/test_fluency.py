"""Fluency and consistency by hand."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from datamodules.records import EditRecord, EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited
from modules.fluency import FLUENCY_PROTOCOLS, References, consistency, fluency, ngram_entropy, tfidf, words, written


def test_words() -> None:
    assert words("Don't stop, Jean-Luc: 3 o’clock!") == ["Don't", "stop", ",", "Jean-Luc", ":", "3", "o’clock", "!"]


def test_entropy_by_hand() -> None:
    # a b a b a: bigrams ab ba ab ba, two of each: 1 bit; trigrams aba bab aba: 2/3 and 1/3
    text = "a b a b a"
    trigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert ngram_entropy(text, 2) == pytest.approx(1.0)
    assert ngram_entropy(text, 3) == pytest.approx(trigrams)
    # ROME: the mean of 2/3 of one and 4/3 of the other
    assert fluency(text) == pytest.approx((2 / 3 * 1.0 + 4 / 3 * trigrams) / 2)
    # nine different words: 8 bigrams, 3 bits; 7 trigrams
    assert fluency("a b c d e f g h i") == pytest.approx(3 / 3 + 2 / 3 * math.log2(7))


def test_repetition_and_short_texts_have_no_entropy() -> None:
    assert fluency("no no no no no no") == 0
    assert fluency("one") == fluency("") == 0
    assert fluency("two words") == 0  # one bigram, no trigram


def test_cosine_by_hand() -> None:
    # idf = ln((1 + 3) / (1 + df)) + 1 (scikit-learn's): football, plays, pitcher df 1; sport df 2
    vectorizer = tfidf(["football sport", "plays sport", "pitcher"])
    rare, common = math.log(4 / 2) + 1, math.log(4 / 3) + 1
    # texts: football twice, sport once; references: football, sport, pitcher
    dot = 2 * rare * rare + common * common
    norms = math.hypot(2 * rare, common) * math.sqrt(2 * rare**2 + common**2)
    found = consistency(["Football sport,", "football unknown"], ["sport", "football pitcher"], vectorizer)
    assert found == pytest.approx(dot / norms)
    assert consistency(["sport football"], ["football sport"], vectorizer) == pytest.approx(1)
    assert consistency(["football"], ["plays"], vectorizer) == 0
    assert consistency(["nothing known"], ["plays"], vectorizer) == 0
    assert consistency([], ["plays"], vectorizer) == 0


def test_what_a_model_writes(tiny: Callable[..., Backbone]) -> None:
    edited = Edited(tiny())
    prompts = [["City A is", "A longer prompt about City A is"], ["City B lies in"]]
    references = [["a land of rivers", "rivers in a land"], []]
    first, second = written(edited, prompts, references, max_tokens=48)
    assert len(first.texts) == 2
    for prompt, text in zip([*prompts[0], *prompts[1]], [*first.texts, *second.texts], strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)
        assert len(encode(edited.backbone.tokenizer, text).ids) <= 48 + 4  # bytes that are no text come back as others
    assert first.fluency == pytest.approx(sum(map(fluency, first.texts)) / 2)
    assert first.consistency == consistency(first.texts, references[0], tfidf(references[0]))
    assert second.consistency is None
    assert set(first.values) == set(FLUENCY_PROTOCOLS)
    assert second.values == {"fluency/ngram_entropy": second.fluency}
    assert written(edited, prompts, max_tokens=48)[0].consistency is None


def test_a_repeated_prompt_is_written_once_and_weighs_twice(tiny: Callable[..., Backbone]) -> None:
    edited, asked = Edited(tiny()), []
    real = edited.generate
    edited.generate = lambda prompts, **how: asked.extend(prompts) or real(prompts, **how)  # type: ignore[method-assign]
    prompts = ["City A is", "City A was", "City A is"]
    one, other = written(edited, [prompts, prompts[1:2]], max_tokens=40)
    assert sorted(asked) == ["City A is", "City A was"]
    assert (one.texts[0], one.texts[1]) == (one.texts[2], other.texts[0])
    twice, once = fluency(one.texts[0]), fluency(one.texts[1])
    assert one.fluency == pytest.approx((2 * twice + once) / 3)


def test_references_are_told_by_relation_and_target() -> None:
    texts = {("P1", "Q1"): ("football sport", "plays sport"), ("P1", "Q2"): ("pitcher",)}
    references = References(texts)
    record = EditRecord("a", (EditRequest("x", "y"),), domain="P1", target_id="Q1")
    assert references.of(record) == texts["P1", "Q1"]
    assert references.of(replace(record, target_id="Q9")) == references.of(replace(record, domain=None)) == ()
    assert set(references.vectorizer.vocabulary_) == {"football", "sport", "plays", "pitcher"}


def test_what_cannot_be_written_is_refused(tiny: Callable[..., Backbone]) -> None:
    edited = Edited(tiny())
    with pytest.raises(ValueError, match=r"'a very long prompt indeed' is \d+ tokens long, max_tokens is 10"):
        written(edited, [["short"], ["a very long prompt indeed"]], max_tokens=10)
    with pytest.raises(ValueError, match="prompts for each of 1 records"):
        written(edited, [[]])
    with pytest.raises(ValueError, match="prompts for each of 2 records"):
        written(edited, [["a"], ["b"]], [["x"]])
    assert written(edited, []) == []


@pytest.mark.parametrize("more", ["ian law", "'s law", " of laws", ". Law", ""])
def test_a_continuation_joins_as_it_was_written(tiny: Callable[..., Backbone], more: str) -> None:
    """A word that is written on is one word."""
    edited = Edited(tiny())
    edited.generate = lambda prompts, **_: [more for _ in prompts]  # type: ignore[method-assign]
    assert written(edited, [["The Paris"]], max_tokens=48)[0].texts == (f"The Paris{more}",)
