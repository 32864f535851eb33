"""An edited model in lm-eval against lm-eval's own model on the same weights."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bag_of_words import BagOfWords
from deltas import Nudge
from gist_exports import export_gists

from datamodules.records import EditRecord, EditRequest
from modules.asked import Asked
from modules.backbone import Backbone
from modules.editor import Edited
from modules.export import load_editor
from modules.training_free import GRACE, RAG
from modules.training_free.icl import InContext

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
from lm_eval.models.huggingface import HFLM

from modules.ability.lm_eval_model import EditedLM

PAIRS = [
    ("The city is in", " Peru"),
    ("The city is in ", "Peru"),
    ("Two  spaces  ", "and more"),
    ("A line\n", "\nanother"),
    ("(", "A)"),
    ("问题", "答案"),
    ("no (space", "between)"),
    ("", "Nothing before"),
    ("One", " "),
]
STOPS = {"until": ["\n", "e"], "max_gen_toks": 50, "do_sample": False}


def asked(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=given) for given in arguments]


def theirs(backbone: Backbone, model: Any = None) -> Any:
    return HFLM(pretrained=model or backbone.model, tokenizer=backbone.tokenizer, batch_size=3, device="cpu")


def agree(ours: list[tuple[float, bool]], others: list[tuple[float, bool]]) -> None:
    assert [s for s, _ in ours] == pytest.approx([s for s, _ in others], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in others]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_as_lm_evals_own_model(kind: str, tiny: Callable[..., Backbone]) -> None:
    backbone = tiny(kind)
    ours, other = EditedLM(Edited(backbone), batch_size=3), theirs(backbone)
    agree(ours.loglikelihood(asked(*PAIRS)), other.loglikelihood(asked(*PAIRS), disable_tqdm=True))
    next_letters = asked(*((f"City {i} is", chr(c)) for i in range(6) for c in range(33, 127)))
    told = EditedLM(Edited(backbone), batch_size=64).loglikelihood(next_letters)
    assert 0 < sum(greedy for _, greedy in told) <= 6
    for request, (_, greedy) in zip(next_letters, told, strict=True):
        if greedy:
            assert ours.generate_until(asked((request.args[0], {"max_gen_toks": 1}))) == [request.args[1]]
    texts = asked(("Some words",), ("A much longer text, with\nlines.",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(
        other.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-4
    )
    wanted = asked(*((p, STOPS) for p, _ in PAIRS[:4]), ("Other", {"until": "a", "max_gen_toks": 7}))
    found = ours.generate_until(wanted)
    assert found == other.generate_until(wanted, disable_tqdm=True)
    assert any(found)
    assert not any("e" in text or "\n" in text for text in found[:4])


def test_edited_weights_go_in(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone = tiny()
    torch.manual_seed(1)
    with Nudge(layers=[1, 2]).edit(backbone, [r.request for r in records]) as edited:
        ours = EditedLM(edited).loglikelihood(asked(*PAIRS))
        agree(ours, theirs(backbone, edited.merge()).loglikelihood(asked(*PAIRS), disable_tqdm=True))
    assert abs(ours[0][0] - EditedLM(Edited(backbone)).loglikelihood(asked(*PAIRS))[0][0]) > 0.1


def test_text_before_the_prompt_goes_in(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone = tiny()
    with InContext().edit(backbone, [r.request for r in records[:2]]) as edited:
        pairs = [pair for pair in PAIRS if pair[0]]  # else the context's own line break would be scored
        told = [(edited.context + p, c) for p, c in pairs]
        agree(EditedLM(edited).loglikelihood(asked(*pairs)), EditedLM(Edited(backbone)).loglikelihood(asked(*told)))


def test_what_is_stopped_early_is_as_if_written_at_once(tiny: Callable[..., Backbone]) -> None:
    model, prompts = EditedLM(Edited(tiny())), [f"Number {i} is" for i in range(5)]
    limits: list[int] = []
    plain = model.edited.generate

    def generate(prompts: Any, limit: int, batch_size: int) -> list[str]:
        limits.append(limit)
        return plain(prompts, limit, batch_size)

    model.edited.generate = generate  # type: ignore[method-assign]
    whole = plain(prompts, 100)
    some = whole[0][:3]
    stops = [[some, "never"] if i < 3 else ["never"] for i in range(5)]
    found = model.generate_until(
        asked(*((p, {"until": stop, "max_gen_toks": 100}) for p, stop in zip(prompts, stops, strict=True)))
    )
    assert found == [text.split(some)[0] if i < 3 else text for i, text in enumerate(whole)]
    assert found[0] == ""
    assert limits == [32, 64, 100]
    with pytest.raises(ValueError, match="do_sample: false"):
        model.generate_until(asked(("a", {"until": [], "do_sample": True, "temperature": 0.7})))


def test_editors_that_read_the_prompt_get_it_whole(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    backbone, editor = tiny(), RAG(top_k=1)
    editor.sentences = BagOfWords()
    prompt = "Question: City B is in\nAnswer:"
    with editor.edit(backbone, [r.request for r in records]) as edited:
        model = EditedLM(edited)
        found = model.loglikelihood(asked((prompt, " Peru")))[0][0]
        assert found == pytest.approx(float(edited.score([prompt], ["Peru"])[0].log_probs.sum()))
        assert prompt in editor.sentences.texts
        for pair in (("", "alone"), ("no (space", "between)")):
            with pytest.raises(ValueError, match="Prompted reads the prompt"):
                model.loglikelihood(asked(pair))
        with pytest.raises(ValueError, match="without a context"):
            model.loglikelihood_rolling(asked(("text",)))
    with GRACE(layer=1, steps=1).edit(backbone, [records[0].request]) as edited:
        assert edited.reads_prompts  # its codebook is asked at the prompt's last token


def test_an_editor_of_gists_scores_texts_without_a_prompt(tmp_path: Path) -> None:
    """It reads no prompt as text; solved questions are read without its pool, and everything that is scored with it."""
    editor = load_editor(export_gists(tmp_path / "gists", "qk"))
    with editor.edit(editor.reader, [EditRequest("City B is in", "Peru")]) as edited:
        model = EditedLM(edited)
        assert model.loglikelihood_rolling(asked(("City B is in Peru",)))[0] < 0
        assert all(total < 0 for total, _ in model.loglikelihood(asked(("", "alone"), ("no (space", "between)"))))
        solved = Asked("Question: 1 + 1 is\nAnswer: 2\n\n", "Question: City B is in\nAnswer:")
        apart, whole = model.loglikelihood(asked((solved, " Peru"), (str(solved), " Peru")))
        assert apart[0] == pytest.approx(float(edited.score([solved], ["Peru"])[0].log_probs.sum()))
        assert apart != whole
