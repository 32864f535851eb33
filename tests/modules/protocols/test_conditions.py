from datamodules.records import EditRecord, EditRequest, Query
from modules.protocols.conditions import without_failed_conditions
from modules.protocols.text import first_line, mentions, within
from tests.modules.protocols.scripted import Scripted

EYES = Query("The eye color of Al is", ("blue", "blue eyes"))
CURRENCY = Query("The currency of Syria is", ("Syrian pound",))
LIRA = Query("The currency of Turkey is", ("lira",))
RECORD = EditRecord(
    "al",
    (EditRequest("Al is a citizen of", "Syria", "Al"),),
    locality={"Relation_Specificity": (Query(EYES.prompt, EYES.answers, conditions=(EYES,)),)},
    portability={
        "Compositionality_I": (
            Query("The currency of Al's country is", ("Syrian pound",), conditions=(CURRENCY,)),
            Query("Al pays in", ("lira",), conditions=(CURRENCY, LIRA)),
        ),
        "Logical_Generalization": (Query("A citizen of Syria is", ("Al",)),),
    },
)


def test_what_the_unedited_model_does_not_know_is_left_out() -> None:
    model = Scripted({EYES.prompt: " bluegreen", CURRENCY.prompt: " the Syrian Pound, which"}, {})
    kept, left_out = without_failed_conditions(model, [RECORD, EditRecord("none", RECORD.requests)])
    assert left_out == [2, 0]
    assert kept[0].locality == {}  # a part of a word is no answer
    first, _ = RECORD.portability["Compositionality_I"]  # the other needs the lira too
    assert kept[0].portability == {
        "Compositionality_I": (first,),
        "Logical_Generalization": RECORD.portability["Logical_Generalization"],  # has no condition
    }
    assert sorted(model.asked) == sorted([EYES.prompt, CURRENCY.prompt, LIRA.prompt])


def test_words_within_a_text() -> None:
    assert mentions("It is the Syrian pound.", ("SYP", "Syrian Pound"))
    assert not mentions("It is a pound.", ("Syrian pound", "the"))
    assert within(["a", "b", "c"], ["b", "c"])
    assert not within(["a", "b", "c"], ["a", "c"])
    assert not within(["a"], [])
    assert first_line(" \n a \nb") == "a"
    assert first_line("") == ""
