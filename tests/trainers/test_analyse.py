"""`python -m trainers.analyse` on exports of random models, and its figures."""

import json
from pathlib import Path

import pytest
from gist_exports import DATA, SHAPE, export_gists

from modules.backbone import BackboneConfig
from modules.export import export
from modules.gist.analysis_temperature import Aligned
from modules.gist.analysis_traces import Place
from modules.trained.mend import MEND
from trainers.analyse import analyse, trained_on
from trainers.callbacks.gist_drawing import place_figure, temperature_figure
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


def test_temperature_figure() -> None:
    found = [
        Aligned(1, [0.5, 0.7], [1.0, 1.0], 1.0, None, 9),
        Aligned(10, [1.0, 1.6], [None, 0.6], 0.7, [0.5, 0.9], 9),
        Aligned(100, [2.0, 2.4], [0.5, 0.4], 0.45, [0.6, 0.6], 9),
    ]
    temperatures, entropies = temperature_figure(found, reference=1, configured=0.3).axes
    first, second, all_layers, level = temperatures.lines
    assert list(first.get_xdata()) == [1, 10, 100]
    assert [repr(float(y)) for y in first.get_ydata()] == ["1.0", "nan", "0.5"]  # a gap where no temperature would do
    assert list(second.get_ydata()) == [1.0, 0.6, 0.4]
    assert list(all_layers.get_ydata()) == [1.0, 0.7, 0.45]
    assert list(level.get_ydata()) == [0.3, 0.3]
    now, then, goal = entropies.lines
    assert list(now.get_ydata()) == pytest.approx([0.6, 1.3, 2.2])
    assert (list(then.get_xdata()), list(then.get_ydata())) == ([10, 100], pytest.approx([0.7, 0.6]))
    assert list(goal.get_ydata()) == pytest.approx([0.6, 0.6])
    assert temperatures.get_xlabel() == "edits in the pool"


def test_one_choice_for_all_layers_is_one_line() -> None:
    found = [Aligned(n, [0.5], [1.0], 1.0, None, 9) for n in (1, 5)]
    temperatures, entropies = temperature_figure(found, 1, 0.45).axes
    assert str(temperatures.lines[0].get_label()).startswith("aligned")
    assert len(temperatures.lines) == len(entropies.lines) == 2  # pools without a temperature have no entropy with it


def test_place_figure() -> None:
    right = [Place(-1, 8, 0.9, 0.1, 0.5), Place(0, 8, 0.2, 0.7, 0.6)]
    wrong = [Place(0, 3, 0.6, 0.2, 1.1), Place(1, 2, 0.5, 0.3, 1.2)]
    figure = place_figure(right, wrong, 100)
    drawn = {a.get_title(): [line for line in a.lines if len(line.get_xdata())] for a in figure.axes}
    golden, zero, entropy = drawn.values()
    assert [list(line.get_ydata()) for line in golden] == [[0.1, 0.7], [0.2, 0.3]]
    assert [list(line.get_ydata()) for line in zero] == [[0.9, 0.2], [0.6, 0.5]]
    assert [list(line.get_ydata()) for line in entropy] == [[0.5, 0.6], [1.1, 1.2]]
    assert [list(line.get_xdata()) for line in golden] == [[-1, 0], [0, 1]]
    texts = [t.get_text() for t in figure.legends[0].get_texts()]
    assert texts == ["answered right (8 queries)", "answered wrong (3 queries)"]
    assert len(place_figure(right, [], 100).legends[0].get_texts()) == 1
