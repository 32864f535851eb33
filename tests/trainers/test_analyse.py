"""`python -m trainers.analyse` on exports of random models."""

import json
from pathlib import Path

import pytest
from gist_exports import DATA, SHAPE, export_gists

from modules.backbone import BackboneConfig
from modules.export import export
from modules.trained.mend import MEND
from trainers.analyse import analyse, trained_on
from trainers.command import run


@pytest.fixture(scope="module", params=["qk", "hidden"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    trained = {"data": {"init_args": {"pool_sizes": [2, 4]}}}
    return export_gists(tmp_path_factory.mktemp(request.param) / "editor", request.param, trained)


def test_analyse_writes_everything(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "analysis"
    run(analyse, [f"--editor={exported}", DATA, "--pool_sizes=3,12", "--queries=6", f"--out={out}"])
    told = json.loads((out / "analysis.json").read_text())
    temperature = told["temperature"]
    assert temperature["reference"] == 4  # the largest of its training
    assert [p["edits"] for p in temperature["pools"]] == [3, 4, 12]
    assert temperature["to_set"] == temperature["pools"][-1]["temperature"]
    layers = 2 if told["meta"]["selection"] == "qk" else 1
    assert told["meta"]["layers"] == [2, 3]
    assert set(told["selection"]) == {"3", "12"}
    for one in told["selection"].values():
        assert one["queries"]["in_scope"] == 6
        assert 0 < one["queries"]["out_of_scope"] <= 6
        assert len(one["by_layer"]["in_scope"]["zero"]) == len(one["by_layer"]["out_of_scope"]["zero"]) == layers
        assert all(0 <= p <= 1 for p in one["by_layer"]["in_scope"]["golden"])
        share = one["answered_right"]["in_scope"]
        assert bool(one["by_place"]["right"]) == (share > 0)
        assert bool(one["by_place"]["wrong"]) == (share < 1)
        tokens = one["by_answer_token"]
        assert tokens[0]["queries"] == 6
        assert all(share <= a["right"] <= 1 and 0 <= a["golden"] <= 1 for a in tokens[:1])
    pictures = {"temperature"} | {f"{name}_{n}" for name in ("layers", "places", "tokens") for n in (3, 12)}
    assert {p.stem for p in out.glob("*.png")} == pictures
    assert all((out / f"{name}.png").stat().st_size > 5000 for name in pictures)
    said = " ".join(capsys.readouterr().out.split())
    assert "to set for pools of 12: gist.temperature" in said
    assert "keeps the entropy of pools of 4" in said
    assert "12 edits: the answers' tokens, given those before" in said


def test_analyse_aligns_to_what_is_asked_for(exported: Path, tmp_path: Path) -> None:
    run(analyse, [f"--editor={exported}", DATA, "--pool_sizes=10", "--reference=1", "--queries=2", f"--out={tmp_path}"])
    pools = json.loads((tmp_path / "analysis.json").read_text())["temperature"]["pools"]
    assert [p["edits"] for p in pools] == [1, 10]
    assert pools[0]["temperature"] == pytest.approx(1, rel=1e-5)


def test_the_temperature_to_set_is_that_of_the_largest_pool_asked_for(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not the reference's own, which is 1, where that is larger."""
    more = ["--pool_sizes=3,12", "--reference=30", "--queries=2", f"--out={tmp_path}"]
    run(analyse, [f"--editor={exported}", DATA, *more])
    temperature = json.loads((tmp_path / "analysis.json").read_text())["temperature"]
    assert [p["edits"] for p in temperature["pools"]] == [3, 12, 30]
    assert temperature["pools"][2]["temperature"] == pytest.approx(1, rel=1e-5)
    assert temperature["to_set"] == temperature["pools"][1]["temperature"] != temperature["pools"][2]["temperature"]
    assert "pools of 12" in " ".join(capsys.readouterr().out.split()).partition("keeps the entropy of pools of 30")[2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pool_sizes=41"], "the largest pool has 41 edits, the data has 40 different ones"),
        (["--pool_sizes=0"], "all must be at least 1"),
        (["--device=cuda:7"], "CUDA devices"),
        ([f"--out={__file__}"], "--out .* is a file; give another folder"),
    ],
)
def test_analyse_says_what_is_wrong(exported: Path, tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        run(analyse, [f"--editor={exported}", DATA, f"--out={tmp_path / 'out'}", *more])
    assert not (tmp_path / "out").exists()


def test_an_export_of_another_editor_is_refused_by_name(tmp_path: Path) -> None:
    module = MEND(BackboneConfig("random:llama", overrides=SHAPE))
    module.configure_model()
    export(module, tmp_path / "mend")
    (tmp_path / "mend" / "editor.safetensors").unlink()  # nothing of it needs to be loaded for that
    with pytest.raises(SystemExit, match="is an export of 'mend', which has no gists"):
        run(analyse, [f"--editor={tmp_path / 'mend'}", DATA])
    with pytest.raises(SystemExit, match=r"no editor\.json"):
        run(analyse, [f"--editor={tmp_path}", DATA])


def test_the_pools_of_training(exported: Path, tmp_path: Path) -> None:
    assert trained_on(str(exported)) == 4
    assert trained_on(str(tmp_path)) == 1
    (tmp_path / "editor.json").write_text("{}")
    assert trained_on(str(tmp_path)) == 1
