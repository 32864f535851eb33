"""MeLLo with a scripted model: subquestions, retrieved facts, final answers, and what is scored."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from bag_of_words import BagOfWords

from datamodules.records import EditRequest
from modules.asked import Asked
from modules.backbone import Backbone
from modules.editor import Edited
from modules.training_free import MeLLo
from modules.training_free.mello import FACT, FINAL, QUESTION, SHOTS, STEP, Trace, Worked, done

REQUESTS = [EditRequest("Lyon is in", "Japan", "Lyon"), EditRequest("The capital of Japan is", "Oslo", "Japan")]
ASKED = "What is the capital of the country of Lyon?"
FIRST = "Subquestion: Which country is Lyon in?\nGenerated answer: Lyon is in France.\n"
SECOND = "It contradicts, so: Japan\nSubquestion: What is the capital of Japan?\nGenerated answer: It is Tokyo.\n"
HOPS = [FIRST + FACT, f"{SECOND}{FACT} made up\n", f"It contradicts, so: Oslo\n{FINAL} Oslo\n\n{QUESTION} What else?\n"]
WORKED = (
    f"{QUESTION} {ASKED}\n{FIRST}{FACT} Lyon is in Japan.\n{SECOND}{FACT} The capital of Japan is Oslo.\n"
    "It contradicts, so: Oslo\n"
)


@pytest.fixture
def mello() -> MeLLo:
    editor = MeLLo(hop_tokens=10 * STEP)
    editor.sentences = BagOfWords()  # type: ignore[assignment]
    return editor


@pytest.fixture
def large(tiny: Callable[..., Backbone]) -> Backbone:
    return tiny(max_position_embeddings=8192)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, list[str]]], list[list[str]]]:
    """Puts a script in the place of generation: what is written in each hop of each question; gives the calls."""

    def use(scripts: dict[str, list[str]]) -> list[list[str]]:
        calls: list[list[str]] = []

        def more(text: str, length: int) -> str:
            head, _, rest = text.partition("\n")
            hops = scripts[head.removeprefix(f"{QUESTION} ")]
            _, fact, piece = rest.rpartition(FACT)
            piece = piece.partition("\n")[2] if fact else piece
            hop = rest.count(FACT)
            script = hops[hop] if hop < len(hops) else ""
            assert script.startswith(piece)
            return script[len(piece) : len(piece) + length]

        def generate(self: Edited, prompts: Sequence[str], length: int = 16, batch_size: int = 32) -> list[str]:
            calls.append(list(prompts))
            return [more(prompt, length) for prompt in prompts]

        monkeypatch.setattr(Edited, "generate", generate)
        return calls

    return use


def worked(editor: MeLLo, backbone: Backbone) -> Worked:
    edited = editor.unedited(backbone).add(REQUESTS)
    assert isinstance(edited, Worked)
    return edited


def test_a_question_is_worked_through_hop_by_hop(mello: MeLLo, large: Backbone, scripted) -> None:
    calls = scripted({ASKED: HOPS, "Who?": [f"{FINAL} me"]})
    edited = worked(mello, large)
    found = edited.work([ASKED, "Who?", ASKED])
    assert found[0] is found[2]
    assert found[0] == Trace(WORKED, "Oslo", open=False)
    assert found[1] == Trace(f"{QUESTION} Who?\n", "me", open=False)
    assert edited.generate([ASKED, "Who?"]) == ["Oslo", "me"]
    assert edited.generate([Asked("Q: Who? A: you\n", f"Q: {ASKED} A:", ASKED)]) == ["Oslo"]
    made = len(calls)
    edited.work([ASKED])
    assert len(calls) == made  # once is enough
    steps = sum(-(-len(hop.partition(" made up")[0]) // STEP) for hop in HOPS)
    assert made <= 2 * steps + 1  # no hop is written beyond its end


def test_what_leads_nowhere_ends_without_an_answer(mello: MeLLo, large: Backbone, scripted) -> None:
    wandering = {
        "a": ["I do not know."],
        "b": [f"No subquestion here.\n{FACT}"],
        "c": [FIRST + FACT, f"So: Japan\n{QUESTION} Another?\n{FINAL} no"],
        "d": [FIRST + "and so on " * 100],
        "e": [f"Subquestion: \n{FACT}"],
    }
    scripted(wandering)
    edited = worked(mello, large)
    assert edited.generate(list(wandering)) == [""] * 5
    kept = [f"{QUESTION} {letter}\n" for letter in wandering]
    kept[2] += f"{FIRST}{FACT} Lyon is in Japan.\n"
    assert [trace.text for trace in edited.work(list(wandering))] == kept


def test_no_more_hops_than_allowed(mello: MeLLo, large: Backbone, scripted) -> None:
    scripted({ASKED: [FIRST + FACT] * 9})
    mello.hops = 2
    (trace,) = worked(mello, large).work([ASKED])
    assert trace == Trace(f"{QUESTION} {ASKED}\n" + f"{FIRST}{FACT} Lyon is in Japan.\n" * 2, "", open=False)


def test_when_a_hop_is_whole() -> None:
    for piece in (FIRST + FACT, f"{FINAL} Oslo\n", f"Well.\n{QUESTION} What"):
        assert done(piece)
    for piece in ("", FIRST, f"{FINAL} Os", "Subquestion: Question:"):
        assert not done(piece)


def test_a_target_is_scored_as_the_final_answer(mello: MeLLo, large: Backbone, scripted) -> None:
    scripted({ASKED: HOPS})
    edited = worked(mello, large)
    (score,) = edited.score([ASKED], ["Oslo"])
    (expected,) = Edited(large).score([f"{SHOTS.rstrip()}\n\n{WORKED}{FINAL}"], ["Oslo"])
    assert torch.equal(score.target, expected.target)
    torch.testing.assert_close(score.log_probs, expected.log_probs, atol=2e-4, rtol=1e-4)
    before = len(f"{SHOTS.rstrip()}\n\n{WORKED}{FINAL}") - len(ASKED)
    assert edited.context_tokens([ASKED]) == [before]
    with pytest.raises(ValueError, match="empty"):
        edited.score([""], ["Oslo"])


def test_a_question_that_fills_the_window_ends_there(mello: MeLLo, tiny, scripted) -> None:
    scripted({ASKED: [FIRST + FACT] * 9})
    room = len(SHOTS.rstrip()) + 2 + len(f"{QUESTION} {ASKED}\n") + 2 * len(f"{FIRST}{FACT} Lyon is in Japan.\n") + 20
    mello.hop_tokens = STEP * 5
    edited = worked(mello, tiny(max_position_embeddings=room))
    (trace,) = edited.work([ASKED])
    assert trace.text.count(FACT) == 1
    assert edited.score([ASKED], ["Oslo"])
    with pytest.raises(ValueError, match="too long for the context window"):
        edited.work(["a" * 500])
    with pytest.raises(ValueError, match=r"mello: the examples have .* tokens and the context window 512"):
        mello.unedited(tiny(max_position_embeddings=512))


def test_without_edits_it_is_the_unedited_model(mello: MeLLo, large: Backbone) -> None:
    with mello.edit(large, []) as edited:
        (a,), (b,) = edited.score(["Lyon is in"], ["Peru"]), Edited(large).score(["Lyon is in"], ["Peru"])
        assert torch.equal(a.log_probs, b.log_probs)
        assert edited.generate(["Lyon is in"], 4) == Edited(large).generate(["Lyon is in"], 4)
        assert edited.context_tokens(["Lyon is in"]) == [0]


def test_examples_from_a_file(mello: MeLLo, large: Backbone, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(f"{QUESTION} a\nSubquestion: b\nGenerated answer: c\n{FACT} d\n{FINAL} e\n", encoding="utf-8")
    mello.prompt_file = str(file)
    assert worked(mello, large).context == file.read_text() + "\n"
    file.write_text("Question: a\nSubquestion: b\nFinal answer: c", encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompt.txt has no 'Retrieved fact:'"):
        mello.unedited(large)
    mello.prompt_file = str(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match=r"nowhere.txt cannot be read"):
        mello.unedited(large)
    with pytest.raises(ValueError, match="at least 1, got 0, 96"):
        MeLLo(hops=0)


def test_the_shipped_examples_are_in_the_form_that_is_read() -> None:
    examples = SHOTS.strip().split("\n\n")
    assert len(examples) == 4
    changed = 0
    for example in examples:
        question, _, rest = example.partition("\n")
        *hops, last = rest.split(FACT)
        trace = Trace(question + "\n")
        for hop in hops:
            piece = hop if hop is hops[0] else hop.partition("\n")[2]
            assert trace.read(piece + FACT)
        trace.read(last.partition("\n")[2])
        assert trace.answer
        assert trace.answer in rest.partition(FINAL)[0]
        assert 2 <= len(hops) <= 3
        changed += rest.count("contradicts the generated answer")
    assert changed == 4
