"""Value vectors on disk: taken from there for what decides them alone, the edits in force among it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from datamodules.records import EditRequest
from modules.backbone import Backbone
from modules.training_free import MEMIT, ROME, CoachHook, values
from modules.training_free.hook_layer import Scope
from modules.training_free.second_moments import Moments
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions
from modules.training_free.values import find_values

REQUESTS = [EditRequest(f"City {c} is in", "Land 0", f"City {c}") for c in "ABCDE"]
PREFIXES = ["", "I think. "]
FEW = Contexts(counts={3: 1})
OPTIONS = ValueOptions(steps=4, lr=0.2, keep=True)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("values-*.safetensors"))


def test_a_search_in_groups_finds_what_one_search_finds(tiny: Callable[..., Backbone], folder: Path) -> None:
    backbone = tiny()
    backbone.model.double()
    plain = replace(OPTIONS, keep=False)
    whole = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", plain)
    parts = find_values(backbone, REQUESTS, PREFIXES, 1, "layer", replace(plain, group=2))
    for expected, found in zip(whole, parts, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert not files(folder)


def test_what_was_found_is_not_searched_again(
    tiny: Callable[..., Backbone], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny()
    first = find_values(backbone, REQUESTS[:3], PREFIXES, 1, "layer", replace(OPTIONS, group=2), edits="")
    assert len(files(folder)) == 2
    asked: list[int] = []
    search = values._search
    monkeypatch.setattr(values, "_search", lambda b, rs, *rest: asked.append(len(rs)) or search(b, rs, *rest))
    more = find_values(backbone, REQUESTS[::-1], PREFIXES, 1, "layer", OPTIONS, edits="")
    assert asked == [2]  # the two new ones alone
    for e in range(3):
        assert torch.equal(more.delta[4 - e], first.delta[e])
        assert more.updates[4 - e] == first.updates[e]
    torch.testing.assert_close(
        more.delta[0], find_values(backbone, REQUESTS[4:], PREFIXES, 1, "layer", replace(OPTIONS, keep=False)).delta[0]
    )


@pytest.mark.parametrize("change", ["weights", "layer", "place", "options", "contexts", "target"])
def test_other_values_are_not_taken(tiny: Callable[..., Backbone], folder: Path, change: str) -> None:
    backbone = tiny()
    find_values(backbone, REQUESTS[:1], PREFIXES, 1, "layer", OPTIONS, edits="")
    if change == "weights":
        with torch.no_grad():
            next(backbone.model.parameters()).add_(1e-3)
    find_values(
        backbone,
        [replace(REQUESTS[0], target="Land 1")] if change == "target" else REQUESTS[:1],
        [*PREFIXES, "So. "] if change == "contexts" else PREFIXES,
        2 if change == "layer" else 1,
        "mlp" if change == "place" else "layer",
        replace(OPTIONS, lr=0.3) if change == "options" else OPTIONS,
        edits="",
    )
    assert len(files(folder)) == 2


def test_passes_of_other_sizes_take_the_same_values(tiny: Callable[..., Backbone], folder: Path) -> None:
    backbone = tiny()
    for options in (OPTIONS, replace(OPTIONS, chunk=3, group=1)):
        find_values(backbone, REQUESTS[:2], PREFIXES, 1, "layer", options, edits="")
    assert len(files(folder)) == 1


def short_moments(folder: Path) -> Moments:
    return Moments(tokens=600, length=32, folder=str(folder / "moments"))


EDITORS: dict[str, Any] = {
    "memit": lambda moments: MEMIT([1, 2], values=OPTIONS, contexts=FEW, moments=moments),
    "rome": lambda moments: ROME(1, OPTIONS, FEW, moments),
    "coachhook": lambda moments, scope=None: CoachHook(
        [1, 2], batch=2, scope=scope, values=OPTIONS, contexts=FEW, moments=moments
    ),
}


@pytest.mark.parametrize("name", EDITORS)
def test_a_run_that_was_broken_off_goes_on_where_it_was(
    tiny: Callable[..., Backbone], folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, editor = tiny(), EDITORS[name](short_moments(folder))
    plain = editor.values
    with editor.edit(backbone, REQUESTS[:2]) as edited, edited.edit(REQUESTS[2:3]) as more:
        expected = {layer: d.b for layer, d in more.deltas.items()}
    kept = files(folder)
    assert len(kept) == (3 if name == "rome" else 2)  # ROME's each hang on those before it
    with monkeypatch.context() as patched:
        patched.setattr(values, "_search", None)  # nothing is left to search
        with editor.edit(backbone, REQUESTS[:2]) as edited, edited.edit(REQUESTS[2:3]) as again:
            for layer, d in again.deltas.items():
                assert torch.equal(d.b, expected[layer])
    editor.values = replace(plain, keep=False)
    with editor.edit(backbone, REQUESTS[:2]) as edited, edited.edit(REQUESTS[2:3]) as searched:
        for layer, d in searched.deltas.items():
            torch.testing.assert_close(d.b, expected[layer])
    assert files(folder) == kept


@pytest.mark.parametrize("name", EDITORS)
def test_after_other_edits_other_values_are_searched(tiny: Callable[..., Backbone], folder: Path, name: str) -> None:
    backbone, editor = tiny(), EDITORS[name](short_moments(folder))
    for first in (REQUESTS[:1], REQUESTS[1:2]):
        with editor.edit(backbone, first) as edited, edited.edit(REQUESTS[2:3]):
            pass
    assert len(files(folder)) == 4


def test_what_opens_a_hook_layer_is_part_of_the_edits(tiny: Callable[..., Backbone], folder: Path) -> None:
    backbone = tiny()
    for scope in (Scope(), Scope(first=1)):
        editor = EDITORS["coachhook"](short_moments(folder), scope=scope)
        with editor.edit(backbone, REQUESTS[:1]) as edited, edited.edit(REQUESTS[2:3]):
            pass
    assert len(files(folder)) == 3  # the first edit's are the same


def test_a_broken_file_is_named(tiny: Callable[..., Backbone], folder: Path) -> None:
    backbone = tiny()
    find_values(backbone, REQUESTS[:1], PREFIXES, 1, "layer", OPTIONS, edits="")
    files(folder)[0].write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"values-.*remove it"):
        find_values(backbone, REQUESTS[:1], PREFIXES, 1, "layer", OPTIONS, edits="")
