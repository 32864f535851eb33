"""An answer that a later edit overruled, and that is asked for once more; and edits that another method saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.saved_edits import in_force, left_to_make
from modules.training_free.alphaedit import AlphaEdit
from modules.training_free.ft import FTM
from modules.training_free.memit import MEMIT
from modules.training_free.second_moments import Moments
from modules.training_free.value_options import ValueOptions

X = EditRequest("City A is in", "Land 0", "City A")
Y = EditRequest("City A is in", "Peru", "City A")


def test_in_force() -> None:
    text = EditRequest(text="Bo is here.")
    assert in_force([X, text]) == {X, text}
    assert in_force([X, Y, text]) == {Y, text}
    assert in_force([X, Y, X]) == {X}


def test_left_to_make() -> None:
    text = EditRequest(text="Bo is here.")
    assert left_to_make([X, X, text], []) == [X, text]
    assert left_to_make([X, text], [X]) == [text]
    assert left_to_make([Y, X], [X]) == [Y, X]  # the later one is to hold, as if each had a call of its own
    assert left_to_make([X, Y, X], []) == [Y, X]
    assert left_to_make([X], [X, Y]) == [X]


@pytest.mark.parametrize("kind", ["ft", "memit"])
def test_an_answer_that_was_overruled_is_made_again(tiny: Callable[..., Backbone], kind: str, tmp_path: Path) -> None:
    backbone = tiny()
    editor: Any = FTM(layers=[2], steps=15, lr=0.02) if kind == "ft" else memit(tmp_path)
    lead = []  # of X's answer over Y's
    with editor.edit(backbone, []) as edited:
        for request in (X, Y, X, X):
            edited = edited.add([request])
            x, y = (float(s.log_probs.mean()) for s in edited.score([X.prompt] * 2, [X.target, Y.target]))
            lead.append(x - y)
    if kind == "ft":
        assert lead[0] > lead[1] < lead[2]
    assert abs(lead[2] - lead[1]) > 1e-3
    assert lead[3] == lead[2]  # it is in force already
    assert edited.requests == (X, Y, X)


def memit(folder: Path, kind: type[MEMIT] = MEMIT) -> MEMIT:
    moments = Moments(tokens=2000, length=64, folder=str(folder))
    values = ValueOptions(steps=15, clamp=4.0)
    return kind([1, 2], values=values, moments=moments) if kind is MEMIT else kind([1, 2], moments=moments)


def test_edits_of_another_method_are_refused(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path
) -> None:
    """AlphaEdit needs the keys of all earlier edits, which MEMIT does not keep."""
    backbone, saved = tiny(), tmp_path / "saved"
    with torch.no_grad(), memit(tmp_path).edit(backbone, [records[0].request]) as edited:
        edited.save(saved)
        assert edited.restored(saved).requests == (records[0].request,)
    alphaedit = memit(tmp_path, AlphaEdit)
    with alphaedit.edit(backbone, []) as other, pytest.raises(ValueError, match="made by MEMIT, not by AlphaEdit"):
        other.restored(saved)
