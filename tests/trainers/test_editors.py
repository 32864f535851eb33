"""Editors by what a user writes: every shipped file for every known model, changes, and errors of one line."""

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import yaml
from deltas import Nudge

from modules.backbone import Backbone
from modules.editor import Editor
from modules.training_free import known
from modules.training_free.icl import InContext, Unedited
from modules.training_free.known import KNOWN, Size, known_as
from trainers.editors import FOLDER, Chosen, choose, known_names, read, training_free

NUDGE = {
    "class_path": "deltas.Nudge",
    "init_args": {"layers": [1], "draw": {"scale": 0.5}},
    "backbones": {"gpt2-xl": {"layers": [13, 14]}, "smollm2-135m": {"draw": {"scale": 2}}},
}

NONE = {"fails_on_rank": None, "harm": None}


@pytest.fixture
def nudge(tmp_path: Path) -> str:
    """The path of a config."""
    return written(tmp_path / "nudge.yaml", NUDGE)


def written(path: Path, config: Any) -> str:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", known_names())
def test_every_shipped_file_for_every_known_model(name: str) -> None:
    config = training_free(name)
    for model in (None, *KNOWN):
        editor = config.made_for(model)
        assert isinstance(editor, Editor)
        assert editor.name == name
        assert config.resolved(model).keys() >= {key for key, value in config.arguments.items() if value is not None}


def test_what_ships() -> None:
    assert {"unedited", "icl", "icl_right_edit"} <= set(known_names())
    assert {p.stem for p in FOLDER.glob("*.yaml")} == set(known_names())


def test_a_model_is_known_by_its_sizes(tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny("gpt2")
    assert known_as(backbone) is None
    monkeypatch.setitem(known.KNOWN, "gpt2-xl", Size("gpt2", 4, 32, 128))
    assert known_as(backbone) == "gpt2-xl"
    assert known_as(tiny("gpt2", n_inner=48)) is None  # as Llama 2 7B and Llama 3 8B are two, which differ in this
    assert known_as(tiny("gptj")) is None
    assert len(set(KNOWN.values())) == len(KNOWN)


def test_values_of_a_backbone_are_put_over_the_defaults_and_changes_over_both(
    nudge: str, tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = training_free({"editor": nudge, "name": "hard", "draw": {"scale": "5e-1"}, "fails_after": 3})
    assert config.resolved("gpt2-xl") == {"layers": [13, 14], "draw": {"scale": 0.5}, "fails_after": 3} | NONE
    assert training_free(nudge).resolved("smollm2-135m")["draw"] == {"scale": 2.0}
    monkeypatch.setitem(known.KNOWN, "gpt2-xl", Size("gpt2", 4, 32, 128))
    (plain, hard) = choose(read([nudge, {"editor": nudge, "name": "hard", "layers": [2]}]), tiny("gpt2"))
    assert isinstance(plain.editor, Nudge)
    assert isinstance(hard.editor, Nudge)
    assert (plain.editor.name, hard.editor.name) == ("nudge", "hard")
    assert (plain.editor.layers, hard.editor.layers) == ([13, 14], [2])
    assert plain.editor.draw.scale == 0.5
    assert plain.facts["init_args"] == config.resolved("gpt2-xl") | {"fails_after": -1}
    assert plain.facts["class_path"] == "deltas.Nudge"


def test_an_unknown_model_gets_the_defaults_and_one_warning(nudge: str, tiny: Callable[..., Backbone]) -> None:
    with pytest.warns(UserWarning, match="only for gpt2-xl, smollm2-135m; it runs with its defaults") as caught:
        (found,) = choose(read([nudge]), tiny())
    assert len([w for w in caught if "defaults" in str(w.message)]) == 1
    assert found.facts["init_args"]["layers"] == [1]


def test_an_editor_without_values_of_backbones_needs_no_warning(
    tiny: Callable[..., Backbone], recwarn: pytest.WarningsRecorder
) -> None:
    (found,) = choose(read([{"editor": "icl", "seed": 3}]), tiny())
    assert isinstance(found.editor, InContext)
    assert found.editor.seed == 3
    assert not [w for w in recwarn if "defaults" in str(w.message)]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no editor .nowhere.: .* no editor.json .* the training-free editors are: .*icl, icl_right_edit"),
        ({"weight": 3}, "needs the key `editor`"),
        (
            {"editor": "{nudge}", "weight": 3},
            "argument 'weight' is not known; there are: draw, fails_after, fails_on_rank, harm",
        ),
        ({"editor": "{nudge}", "layers": "x"}, r"nudge \(nudge.yaml\): .*\"layers\".*Got value: x"),
        ({"editor": "{nudge}", "draw": {"size": 3}}, "'size' is not accepted"),
        ({"editor": "{nudge}", "draw": 3}, "draw"),
    ],
)
def test_what_a_user_wrote_wrongly_is_one_line(nudge: str, spec: Any, message: str) -> None:
    if isinstance(spec, dict) and "editor" in spec:
        spec = spec | {"editor": nudge}
    with pytest.raises(ValueError, match=message) as error:
        training_free(spec)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_path": "deltas.Nothing"}, "'deltas.Nothing' cannot be imported"),
        ({"class_path": "deltas.Draw"}, "'deltas.Draw' is no Editor"),
        ({"class_path": "Nudge"}, "cannot be imported"),
        ({"inti_args": {}}, "needs class_path and may have init_args and backbones, nothing else; got .*inti_args"),
        ({"init_args": {"layer": 1}}, r"\(nudge.yaml, init_args\): argument 'layer' is not known"),
        ({"backbones": {"gpt-5": {}}}, "backbone 'gpt-5' is not known; there are: gpt-j-6b, gpt-neox-20b, gpt2-xl"),
        ({"backbones": {"gpt2-xl": {"layer": 1}}}, "backbones.gpt2-xl.*'layer' is not known"),
        ({"backbones": {"gpt2-xl": {"layers": 1}}}, r"\"layers\""),
        ({"backbones": {"gpt2-xl": 3}}, "must be a mapping"),
        ({"init_args": {"draw": {}}, "backbones": {}}, "required: layers"),
    ],
)
def test_what_is_wrong_in_a_file_is_one_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        training_free(written(tmp_path / "nudge.yaml", NUDGE | change))
    assert "\n" not in str(error.value)


def test_two_editors_of_one_name_are_refused(nudge: str, tiny: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match="two editors are called 'nudge'; give each a name"):
        choose(read([nudge, {"editor": nudge, "layers": [2]}]), tiny())


def test_a_mapping_of_numbers_is_replaced_as_a_whole() -> None:
    """Contexts of 10 tokens in place of those of 5 and of 10, not beside them."""
    counts = training_free({"editor": "rome", "contexts": {"counts": {10: 5}}}).resolved(None)["contexts"]["counts"]
    assert counts == {"10": 5}


def test_an_exported_editor_is_known_by_what_its_files_hold(tmp_path: Path) -> None:
    large = bytes(range(256)) * 5000  # more than is read at once
    (tmp_path / "one" / "scope").mkdir(parents=True)
    (tmp_path / "one" / "editor.json").write_bytes(b"{}")
    (weights := tmp_path / "one" / "scope" / "model.safetensors").write_bytes(large)
    facts = Chosen(Unedited(), tmp_path / "one").facts
    # results are kept by this hash: another formula would have all of them computed anew
    assert facts == {"export": sha256(b"editor.json{}scope/model.safetensors" + large).hexdigest()}
    copy = copytree(tmp_path / "one", tmp_path / "two")
    os.utime(copy / "scope" / "model.safetensors", (1, 1))
    assert Chosen(Unedited(), copy).facts == facts
    times = weights.stat()
    weights.write_bytes(large[:-1] + b"!")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert Chosen(Unedited(), tmp_path / "one").facts != facts
