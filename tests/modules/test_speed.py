"""What the speed command measures; of seconds, only that there are any."""

from collections.abc import Callable

import pytest
import torch

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.gist.editor import GistEditor
from modules.gist.model import GistModel
from modules.speed import accuracy, decoding, made_up, prefill, state_bytes
from modules.training_free.icl import InContext, Unedited
from modules.training_free.rag import RAG
from tests.bag_of_words import BagOfWords

REQUESTS = [EditRequest(f"City {c} is in", f"Land {i}") for i, c in enumerate("ABCD")]


def test_what_is_kept_of_gists(tiny_gists: Callable[..., GistModel]) -> None:
    for selection, address in (("qk", 0), ("hidden", 32)):
        model = tiny_gists(selection=selection)
        with GistEditor(model).edit(model.reader, REQUESTS) as edited:
            prefill(edited)
            # keys and values of 2 layers, 2 key-value heads of 8; fp32
            assert state_bytes(edited) == 4 * 4 * (2 * 2 * 2 * 8 + address)


def test_what_is_kept_of_a_context(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    with InContext().edit(backbone, REQUESTS) as edited:
        assert state_bytes(edited) is None  # nothing is read yet, and there is nothing to save
        prefill(edited)
        length = len(edited.context.encode())  # tokens are bytes
        assert state_bytes(edited) == 4 * length * 2 * 4 * 2 * 8  # all 4 layers
    with Unedited().edit(backbone, REQUESTS) as edited:
        prefill(edited)
        assert state_bytes(edited) == 0


def test_a_memory_is_encoded_before_it_is_asked(tiny: Callable[..., Backbone]) -> None:
    editor = RAG()
    editor.sentences = BagOfWords()  # type: ignore[misc]
    with editor.edit(tiny(), REQUESTS) as edited:
        assert edited.memory._vectors is None
        prefill(edited)
        assert edited.memory._vectors is not None
        assert bool(edited.memory._vectors.known.all())
        kept = state_bytes(edited)
    assert kept is not None
    assert kept > edited.memory.vectors().nbytes


@pytest.mark.parametrize("editor", ["icl", "incomes", "unedited"])
def test_decoding_is_that_of_generation(tiny_gists: Callable[..., GistModel], editor: str) -> None:
    model = tiny_gists(selection="both")
    made = {"icl": InContext(), "incomes": GistEditor(model), "unedited": Unedited()}[editor]
    with made.edit(model.reader, REQUESTS) as edited:
        fed: list[int] = []
        plain = edited.decode

        def watched(ids, *args, **options):
            fed.extend(ids[0].tolist())
            return plain(ids, *args, **options)

        prefill(edited)
        edited.decode = watched  # type: ignore[method-assign]
        seconds = decoding(edited, ["City A is in"], new_tokens=5)
        edited.decode = plain  # type: ignore[method-assign]
        tokenizer = edited.backbone.tokenizer
        prompt = list(tokenizer("City A is in", add_special_tokens=False)["input_ids"])
        wanted = edited._generate([prompt], 5)[0]
    # one token, five of which the last is not read again, and one to take off
    assert fed == [*prompt, *prompt, *wanted[:4], *prompt]
    assert seconds.prompt > 0
    assert seconds.token > 0


def test_an_answer_goes_on_beyond_the_end_of_text(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    end = backbone.tokenizer.eos_token_id
    assert isinstance(end, int)
    read: list[int] = []

    def ends(hidden: torch.Tensor) -> torch.Tensor:
        read.append(len(hidden))
        return torch.nn.functional.one_hot(torch.full((len(hidden),), end), 257).float()

    backbone.logits = ends  # type: ignore[method-assign]
    with Unedited().edit(backbone, []) as edited:
        edited.generate(["x"], 6)
        assert len(read) == 1  # it ends at once
        read.clear()
        decoding(edited, ["x"], new_tokens=6)
    assert len(read) == 1 + 6 + 1
    assert backbone.tokenizer.eos_token_id == end


def test_an_answer_beyond_the_window_is_refused(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny(max_position_embeddings=100)
    with InContext().edit(backbone, REQUESTS) as edited, pytest.raises(ValueError, match="context window of 100"):
        decoding(edited, ["City A is in"], new_tokens=20)
    with Unedited().edit(backbone, []) as edited, pytest.raises(ValueError, match="at least 2"):
        decoding(edited, ["x"], new_tokens=1)


def test_accuracy_is_the_mean_over_queries(tiny: Callable[..., Backbone]) -> None:
    with Unedited().edit(tiny(), []) as edited:
        scores = edited.score(["a b", "cd"], ["e", "fgh"])
        expected = sum(float((s.predicted == s.target).float().mean()) for s in scores) / 2
        assert accuracy(edited, ["a b", "cd"], ["e", "fgh"]) == pytest.approx(expected)


def test_edits_that_are_made_up(records: list[EditRecord]) -> None:
    own = [r.request for r in records]
    assert made_up(own, 3) == own[:3]
    more = made_up(own, 16)  # 4 prompts x 4 targets
    assert more[:4] == own
    assert len({r.statement for r in more}) == 16
    assert {r.prompt for r in more} == {r.prompt for r in own}
    assert {r.target for r in more} == {r.target for r in own}
    assert made_up(own, 9, seed=1) == made_up(own, 9, seed=1) != made_up(own, 9, seed=2)
    with pytest.raises(ValueError, match="4 edits make at most 16 different ones, not 17; give more data"):
        made_up(own, 17)
    with pytest.raises(ValueError, match="make at most 1"):
        made_up([EditRequest(text="Rome moved.")], 2)
    assert torch.is_grad_enabled()
