"""Comparing result files: figures by hand, and what is refused."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainers.command import run
from trainers.compare import compare, difference
from trainers.protocols import Measures

Results = dict[str, float]


def result(name: str, accuracy: float, target: str = "Peru") -> dict[str, Any]:
    post = {"rewrite_acc": [accuracy], "rephrase_acc": [1.0, 0.0], "locality": {}, "portability": {}}
    return {"case_id": name, "requested_rewrite": {"prompt": f"{name} is in", "target_new": target}, "post": post}


def report(path: Path, editors: dict[str, dict[int, Results]], code: str | None = None, **meta: Any) -> str:
    """A report of trainers.evaluate: reliability of each record by editor and number of edits."""
    about = {"protocol": "default", "mode": "batch", "backbone": {"source": "m"}} | meta
    records = {e: {str(n): [result(*r) for r in of.items()] for n, of in sizes.items()} for e, sizes in editors.items()}
    run = {"protocol": about["protocol"]} | ({"code": code} if code else {})
    runs = {e: {str(n): run for n in sizes} for e, sizes in editors.items()}
    path.write_text(json.dumps({"meta": about, "aggregate": {}, "runs": runs, "records": records}))
    return str(path)


def rows(text: str) -> dict[str, list[str]]:
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


def test_differences_are_paired_over_common_records(tmp_path: Path) -> None:
    ours = {f"r{i}": i / 10 for i in range(10)}
    theirs = {f"r{i}": i / 10 + 0.05 for i in range(2, 12)}  # a better one, on other records in part
    one = report(tmp_path / "a.json", {"rome": {10: ours}})
    two = report(tmp_path / "b.json", {"memit": {10: theirs}})
    text = compare([one, two], out=str(tmp_path / "t.md"))
    assert (tmp_path / "t.md").read_text() == text
    assert "## default, batch, 10 edits" in text
    assert rows(text)["Editor"] == ["Reliability", "Generality"]
    assert rows(text)["rome"] == ["45.0", "50.0"]
    # records 2 to 9: .55 + .05, and every pair differs by .05, so that the interval has no width
    assert rows(text)["memit"] == ["60.0, **+5.0 (+5.0 to +5.0)**", "50.0, +0.0 (+0.0 to +0.0)"]
    assert "memit: 8 records in common, of its 10 and 10." in text


def test_several_editors_and_numbers_of_edits(tmp_path: Path) -> None:
    low, high = {"a": 0.0, "b": 0.5}, {"a": 1.0, "b": 0.5}
    one = report(tmp_path / "a.json", {"unedited": {2: low}, "rome": {1: low, 2: high}})
    two = report(tmp_path / "b.json", {"rome": {1: high, 2: low}})
    text = compare([one, two], reference="rome")
    assert text.count("## default") == 2
    first, second = text.split("## default")[1:]
    assert list(rows(first)) == ["Editor", "---", f"rome ({one})", f"rome ({two})"]
    assert rows(first)[f"rome ({two})"][0].startswith("75.0, +50.0 (+0.0 to +100.0)")
    assert list(rows(second))[2:] == [f"rome ({one})", "unedited", f"rome ({two})"]
    assert "in common" not in text.replace("the records in common", "")
    only = compare([one, two], edits=[2], metrics=["reliability/token_accuracy"])  # the first editor: unedited
    assert rows(only)["Editor"] == ["reliability/token_accuracy"]
    assert rows(only)["unedited"] == ["25.0"]


def test_cells_of_a_benchmark_are_files_too(tmp_path: Path) -> None:
    def cell(name: str, mode: str, values: Results) -> str:
        point = {"edits": 2, "settings": {"protocol": "default"}, "records": [result(*r) for r in values.items()]}
        about = {"editor": name, "protocol": "default", "mode": mode, "batch": 0, "backbone": {"source": "m"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(about | {"points": [point]}))
        return str(tmp_path / f"{name}.json")

    files = [cell("rome", "batch", {"a": 0.0, "b": 1.0}), cell("ft", "sequential", {"a": 1.0, "b": 1.0})]
    with pytest.raises(ValueError, match=r"mode: .*rome.* has 'batch', .*ft.* has 'sequential'; give --allow mode"):
        compare(files)
    text = compare(files, allow=["mode"])
    assert rows(text)["ft"][0] == "100.0, +50.0 (+0.0 to +100.0)"
    assert f"mode: {files[0]} (rome) has 'batch', {files[1]} (ft) has 'sequential'" in text


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"protocol": "uniedit"},
            r"protocol: .*a\.json.* has 'default', .*b\.json.* has 'uniedit'; figures of two",
        ),
        ({"mode": "single"}, r"mode: .* has 'batch', .* has 'single'; give --allow mode"),
        ({"backbone": {"source": "n"}}, r"backbone: .* has 'm', .* has 'n'"),
        (
            {"backbone": {"source": "m", "dtype": "bfloat16"}},
            r"backbone\.dtype: .* has 'float32', .* has 'bfloat16'; give --allow backbone to",
        ),
        ({"backbone": {"source": "m", "revision": "v2"}}, r"backbone\.revision: .* has None, .* has 'v2'"),
        ({"backbone": {"source": "m", "overrides": {"rope_theta": 1}}}, r"backbone\.overrides: .* has \{\}, .*rope_th"),
        ({"records": {2: {"z": 1.0}}}, r"records: .* have none in common; the first ones are 'a' and 'z'"),
        ({"records": {3: {"a": 1.0}}}, r"edits: .* has \[2\], .*b\.json has \[3\]; give --allow edits"),
    ],
)
def test_what_is_not_alike_is_refused_by_name(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    loaded = {"source": "m", "dtype": "float32", "revision": None, "overrides": {}}
    one = report(tmp_path / "a.json", {"rome": {2: {"a": 1.0}}}, backbone=loaded)
    two = report(tmp_path / "b.json", {"memit": other.pop("records", {2: {"a": 1.0}})}, **other)
    with pytest.raises(ValueError, match=message):
        compare([one, two])
    with pytest.raises(ValueError, match="--allow protocol: only mode, batch, edits, backbone may differ"):
        compare([one, two], allow=["protocol"])


def test_a_model_loaded_otherwise_is_allowed_as_another_one_is(tmp_path: Path) -> None:
    files = [
        report(tmp_path / f"{t}.json", {t: {2: {"a": 1.0}}}, backbone={"source": "m", "dtype": t}) for t in ("f", "b")
    ]
    assert "backbone.dtype: " in compare(files, allow=["backbone"])


def test_consistency_with_other_texts_is_refused(tmp_path: Path) -> None:
    def made(name: str, texts: int) -> str:
        file = report(tmp_path / f"{name}.json", {name: {2: {"a": 1.0}}})
        content = json.loads(Path(file).read_text())
        content["runs"][name]["2"]["reference_texts"] = texts
        Path(file).write_text(json.dumps(content))
        return file

    one, two, none = made("one", 3), made("two", 4), made("none", 0)
    with pytest.raises(ValueError, match=r"reference_texts: .* has 3, .* has 4; consistency \(RS\) with other texts"):
        compare([one, two], allow=["backbone"])
    assert "two" in rows(compare([one, two], metrics=["reliability/token_accuracy"]))
    assert "none" in rows(compare([one, none]))  # whose texts nothing was compared with


def test_other_code_is_told(tmp_path: Path) -> None:
    def cell(name: str, **told: str) -> str:
        point = {"edits": 2, "settings": {"protocol": "default"}, "records": [result("a", 1.0)]}
        about = {"editor": name, "protocol": "default", "mode": "batch", "batch": 0, "backbone": {"source": "m"}}
        (tmp_path / f"{name}.json").write_text(json.dumps(about | {"points": [point]} | told))
        return str(tmp_path / f"{name}.json")

    files = [cell("rome", code="0123456789"), cell("ft", code="abcdefghij"), cell("kn", code="0123456789"), cell("old")]
    text = compare(files)
    assert text.count("code: ") == 1
    assert "(rome) was computed by 01234567, " in text
    assert "(ft) by abcdefgh, which may differ in what they measure" in text
    reports = [report(tmp_path / f"{code}.json", {code: {2: {"a": 1.0}}}, code=code) for code in ("one", "two")]
    assert "(one) was computed by one, " in compare(reports)


def test_one_id_for_two_edits_and_other_demonstrations_are_refused(tmp_path: Path) -> None:
    one = report(tmp_path / "a.json", {"rome": {2: {"a": 1.0}}})
    content = json.loads(Path(one).read_text())
    content["records"]["rome"]["2"] = [result("a", 1.0, "Chad")]
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"records: 'a' is .*Peru.* in .*a\.json and .*Chad.* in .*b\.json"):
        compare([one, str(tmp_path / "b.json")], reference="rome")
    content["runs"]["rome"]["2"]["demonstrations"] = "given"
    (tmp_path / "b.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"protocol: .* has \{\}, .* has \{'demonstrations': 'given'\}"):
        compare([one, str(tmp_path / "b.json")])


def test_other_numbers_of_questions_and_other_files_of_demonstrations_are_refused(tmp_path: Path) -> None:
    def made(name: str, told: str | None, **meta: Any) -> str:
        file = report(tmp_path / f"{name}.json", {name: {2: {"a": 1.0}}}, **meta)
        content = json.loads(Path(file).read_text())
        content["runs"][name]["2"] |= {"demonstrations": "given"} | ({"demonstrations_hash": told} if told else {})
        Path(file).write_text(json.dumps(content))
        return file

    old = made("old", None)  # which does not say how many it asked, nor by which files
    whole, some, other = (
        made("whole", "1a", queries_per_kind=None),
        made("some", "1a", queries_per_kind=2),
        made("other", "2b", queries_per_kind=2),
    )
    with pytest.raises(ValueError, match=r"queries_per_kind: .*whole.* has 'all', .*some.* has 2; figures of oth"):
        compare([whole, some], allow=["mode", "batch", "edits", "backbone"])
    with pytest.raises(ValueError, match=r"demonstrations: .*some.* has '1a', .*other.* has '2b'; answers after other"):
        compare([some, other])
    for new in (whole, some, other):
        assert "| old | 100.0, +0.0" in compare([new, old])
        assert f"| {Path(new).stem} | 100.0, +0.0" in compare([old, new])


def test_other_numbers_of_edits_may_be_allowed(tmp_path: Path) -> None:
    one = report(tmp_path / "a.json", {"rome": {1: {"a": 1.0}, 2: {"a": 0.5, "b": 1.0}}})
    two = report(tmp_path / "b.json", {"memit": {3: {"a": 0.25}}})
    text = compare([one, two], allow=["edits"])
    assert list(rows(text))[2:] == ["rome, 1 edits", "rome, 2 edits", "memit, 3 edits"]
    assert rows(text)["rome, 2 edits"][0] == "50.0, **-50.0 (-50.0 to -50.0)**"


def test_files_that_are_none(tmp_path: Path) -> None:
    one = report(tmp_path / "a.json", {"rome": {2: {"a": 1.0}}})
    with pytest.raises(FileNotFoundError, match=r"no results nowhere\.json"):
        compare([one, "nowhere.json"])
    (tmp_path / "b.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match=r"b\.json holds no results of trainers.evaluate"):
        compare([one, str(tmp_path / "b.json")])
    with pytest.raises(ValueError, match="has rome alone; give a second file"):
        compare([one])
    with pytest.raises(ValueError, match=r"only of \[2\]"):
        compare([one, one], edits=[7])
    with pytest.raises(ValueError, match=r"--reference 'ft' is not in .*; there are: rome"):
        compare([one], reference="ft")
    with pytest.raises(ValueError, match="give the files to compare"):
        compare([])
    with pytest.raises(ValueError, match="--resamples must be at least 1, got 0"):
        compare([one, one], resamples=0)


def test_the_interval_is_a_bootstrap_of_pairs() -> None:
    rng = np.random.default_rng(5)
    one = rng.random((20, 1))
    other = one + rng.normal(0.1, 0.2, (20, 1))
    gap, low, high = difference(one, other, seed=3, resamples=100)
    draw, gaps = np.random.default_rng(3), []
    for _ in range(100):
        at = draw.integers(20, size=20)
        gaps.append(float((other - one)[at].mean()))
    assert gap == pytest.approx(float((other - one).mean()))
    assert [low, high] == pytest.approx(list(np.quantile(gaps, (0.025, 0.975))))


def test_scores_are_harmonic_means_of_means() -> None:
    assert Measures.of(np.array([[1.0, 0.5, 0.5], [0.0, 1.0, 1.0]])) == pytest.approx(9 / 14)  # of 1/2, 3/4, 3/4
    assert Measures.of(np.array([[0.0, 1.0, 1.0]])) == 0.0


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one = report(tmp_path / "a.json", {"rome": {2: {"a": 1.0, "b": 0.0}}})
    two = report(tmp_path / "b.json", {"memit": {2: {"a": 1.0, "b": 0.5}}}, mode="single")
    monkeypatch.setattr(sys, "argv", ["compare", one, two, "--allow", "mode"])
    monkeypatch.delitem(sys.modules, "trainers.compare")
    runpy.run_module("trainers.compare", run_name="__main__")
    assert "| memit | 75.0, +25.0" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["compare"])
    with pytest.raises(SystemExit, match="error: give the files to compare: python -m "):
        runpy.run_module("trainers.compare", run_name="__main__")
    with pytest.raises(SystemExit, match="error: mode: "):
        run(compare, [f"--files={json.dumps([one, two])}"])
