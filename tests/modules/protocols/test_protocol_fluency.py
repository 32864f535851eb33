"""Fluency and consistency by CounterFact's protocol, of written-down texts (tests/golden/protocol_fluency.json).

Worked out by hand. GE is the mean of 2/3 of the bigrams' entropy and 4/3 of the trigrams', so 1/3 and 2/3 of them.

    two      "a b a b a"      ab 2/4, ba 2/4: 1 bit; aba 2/3, bab 1/3: log2(3) - 2/3 = 0.918296           0.945530
             "x yen z"        two bigrams: 1 bit; one trigram: 0                                         0.333333
             its prompt "a b" is there twice, and weighs twice: (2 * 0.945530 + 0.333333) / 3            0.741465
    none     "no no no no"    one bigram, one trigram                                                    0
    without  "Lyon sees Lyon, sees": a comma is a word: four bigrams, 2 bits; three trigrams, log2(3)    1.723308

    GE (0.741465 + 0 + 1.723308) / 3 = 0.821591

RS by scikit-learn's TF-IDF of the three reference texts, whatever their attribute: idf = ln((1 + 3) / (1 + df)) + 1,
of sushi and peso (in one text) 1.693147, of yen (in two) 1.287682; words of a letter are none.

    two      knows of its texts yen alone; its references, joined, are sushi once and yen twice:
             2 * 1.287682 / sqrt(1.693147^2 + (2 * 1.287682)^2) = 2.575364 / 3.082085                     0.835592
    none     has references (peso), but no word that any reference has                                   0
    without  no references: no value

    RS (0.835592 + 0) / 2 = 0.417796
"""

from dataclasses import replace

import pytest

from modules.counterfact import COUNTERFACT, CounterFact
from modules.fluency import FLUENCY_PROTOCOLS, References
from modules.judging import evaluate_pools
from tests.modules.protocols.scripted import BACKBONE, Scripted, Told, figures, golden

GOLDEN = golden("protocol_fluency.json")
REFERENCES = References({(relation, target): tuple(texts) for relation, target, texts in GOLDEN["references"]})


def told() -> Told:
    return Told(Scripted(GOLDEN["generated"], {}, GOLDEN["probabilities"]))


def test_golden_figures() -> None:
    judge = CounterFact(fluency=True, references=REFERENCES)
    evaluation = evaluate_pools(judge, told(), BACKBONE, GOLDEN["records"], 3)
    found = figures(evaluation)
    assert set(found) == {*COUNTERFACT.definitions, *FLUENCY_PROTOCOLS} == set(judge.definitions)
    assert {name: found[name] for name in GOLDEN["figures"]} == pytest.approx(GOLDEN["figures"], abs=1e-6)
    assert [evaluation.aggregates[name]["records"] for name in FLUENCY_PROTOCOLS] == [3, 2]
    posts = [result["post"] for result in evaluation.records]
    assert [post["text"] for post in posts] == GOLDEN["texts"]
    assert [post["ngram_entropy"] for post in posts] == pytest.approx(GOLDEN["entropies"], abs=1e-6)
    assert ["reference_score" in post for post in posts] == [True, True, False]
    settings = evaluation.settings
    assert (settings["fluency"], settings["reference_texts"], settings["records_without_references"]) == (True, 3, 1)


def test_what_is_not_asked_for_is_not_measured() -> None:
    judge = CounterFact(fluency=True)
    alone = evaluate_pools(judge, told(), BACKBONE, GOLDEN["records"], 3)
    assert figures(alone)["fluency/ngram_entropy"] == pytest.approx(
        GOLDEN["figures"]["fluency/ngram_entropy"], abs=1e-6
    )
    assert "consistency/tfidf_cosine" not in {*alone.aggregates, *judge.definitions}
    editor = told()
    plain = evaluate_pools(COUNTERFACT, editor, BACKBONE, GOLDEN["records"], 3)
    assert set(plain.aggregates) == set(COUNTERFACT.definitions)
    assert editor.model.asked == []


def test_fluency_needs_prompts_and_texts_about_some_target() -> None:
    two = GOLDEN["records"][0]
    with pytest.raises(ValueError, match="record 'two' has no generation prompts, which --fluency needs"):
        CounterFact(fluency=True).check([replace(two, generation=())])
    with pytest.raises(ValueError, match="--references: the file has no text about the new attribute"):
        CounterFact(fluency=True, references=References({("P17", "Q1"): ("x",)})).check([two])
