"""What the speed command measures; of seconds, only that there are any."""

from collections.abc import Callable

import pytest
import torch

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.gist.analysis_speed import accuracy, decoding, made_up, prefill, state_bytes
from modules.gist.editor import GistEditor
from modules.gist.model import GistModel
from modules.training_free.icl import InContext, Unedited

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
        assert state_bytes(edited) == 0
        prefill(edited)
        length = len(edited.context.encode())  # tokens are bytes
        assert state_bytes(edited) == 4 * length * 2 * 4 * 2 * 8  # all 4 layers
    with Unedited().edit(backbone, REQUESTS) as edited:
        prefill(edited)
        assert state_bytes(edited) == 0


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
        tokenizer = edited.backbone.tokenizer
        assert str(tokenizer.decode(fed)).startswith("City A is in")
        assert len(fed) == len(b"City A is in") + 4  # the last token is not read again
        edited.decode = plain  # type: ignore[method-assign]
        wanted = edited._generate([list(tokenizer("City A is in", add_special_tokens=False)["input_ids"])], 5)[0]
        assert fed[len(b"City A is in") :] == wanted[:4]
    assert seconds.prompt > 0
    assert seconds.token > 0


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
