"""Tables, figures and the page of answers, from results made by hand."""

import csv
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress

from modules.fluency import FLUENCY
from trainers.benchmark.answers import write_answers
from trainers.benchmark.crew import _clock
from trainers.benchmark.figures import cost, over_number, trade, write_figures
from trainers.benchmark.tables import FIELDS, write_csv, write_tables


def point(edits: int, reliability: float, generality: float, locality: float) -> dict[str, Any]:
    values = {
        "reliability/token_accuracy": reliability,
        "generality/token_accuracy": generality,
        "locality/token_agreement": locality,
    }
    return {
        "edits": edits,
        "metrics": {
            m: {"value": v, "ci": [max(0.0, v - 0.1), min(1.0, v + 0.1)], "records": 4} for m, v in values.items()
        },
        "edit_seconds": 8.0,
        "edit_bytes": 3 * 2**20,
        "answer_seconds": 1.0,
        "edited": 4,
        "settings": {"own_edit_only": False},
        "norms": {},
        "records": [],
    }


def result(editor: str, points: list[dict[str, Any]], mode: str = "batch", **more: Any) -> dict[str, Any]:
    answers = [
        {
            "record": "1",
            "kind": "rewrite",
            "prompt": "A & B is",
            "gold": "Lyon",
            "before": "<b>",
            "after": "Lyon, of course",
        },
        {"record": "1", "kind": "locality/near", "prompt": "C is", "gold": "x", "before": "same", "after": "same"},
    ]
    return {
        "dataset": "facts",
        "editor": editor,
        "mode": mode,
        "batch": 0,
        "edits": [p["edits"] for p in points],
        "protocol": "default",
        "seed": 0,
        "points": points,
        "answers": answers,
        **more,
    }


def results() -> list[dict[str, Any]]:
    failed = result("icl", [point(100, 0, 0, 0)])
    del failed["points"]
    return [
        result("unedited", [point(1, 0.1, 0.1, 1.0)]),
        result("rome_x", [point(1, 0.9, 0.4, 0.8)]),
        result("rome_x", [point(100, 0.5, 0.3, 0.2)]),
        result("memit", [point(1, 0.8, 0.6, 0.7)]),
        result("memit", [point(100, 0.7, 0.35, 0.9)], hardware="a card"),
        failed | {"error": "ValueError: too long", "answers": []},
    ]


def test_csv_has_a_line_for_every_metric(tmp_path: Path) -> None:
    write_csv(results(), tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == FIELDS
    assert len(lines) == 5 * 3
    (one,) = [x for x in lines if x["editor"] == "memit" and x["edits"] == "100" and x["metric"].startswith("gen")]
    assert {k: one[k] for k in ("value", "low", "high", "records", "seconds_per_edit", "edit_mib", "hardware")} == {
        "value": "0.35",
        "low": "0.25",
        "high": "0.45",
        "records": "4",
        "seconds_per_edit": "2",
        "edit_mib": "3",
        "hardware": "a card",
    }


def test_cells_of_before_have_no_memory_of_editing(tmp_path: Path) -> None:
    """They tell what the process held at most, answers with it: not the same figure."""
    old = result("rome_x", [point(100, 0.5, 0.3, 0.2)], memory={"before": 0, "peak": 2**30})
    del old["points"][0]["edit_bytes"]
    new = result("memit", [point(100, 0.7, 0.35, 0.9)])
    write_tables([old, new], tmp_path)
    write_csv([old, new], tmp_path / "r.csv")
    assert " | 2.00 | - |\n" in (tmp_path / "tables.md").read_text()
    with (tmp_path / "r.csv").open() as file:
        assert [line["edit_mib"] for line in csv.DictReader(file)] == [""] * 3 + ["3"] * 3
    figure = cost([old, new])
    assert figure is not None
    assert [text.get_text() for text in figure.axes[1].texts] == [" not measured"]


def test_tables_mark_the_best_and_name_failures(tmp_path: Path) -> None:
    write_tables(results(), tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert text.count("## ") == 2
    first, second = text.split("## ")[1:]
    assert first.startswith("facts, batch, single edits")
    assert "| rome_x | **90.0 (80-100)** | 40.0 (30-50) | **80.0 (70-90)** | 2.00 | 3 |" in first
    # the unedited model's 100 is no victory
    assert "| unedited | 10.0 (0-20) | 10.0 (0-20) | 100.0 (90-100) |" in first
    assert "| memit | **70.0 (60-80)** | **35.0 (25-45)** | **90.0 (80-100)** |" in second
    assert "icl failed: ValueError: too long" in second
    assert "icl failed" not in first
    latex = (tmp_path / "tables.tex").read_text()
    assert latex.count("\\begin{tabular}{lrrrrr}") == 2
    assert "rome\\_x & \\textbf{90.0 (80-100)}" in latex


def test_seconds_are_of_a_request(tmp_path: Path) -> None:
    told, asked = point(4, 0.9, 0.4, 0.8) | {"requests": 16}, [{"requested_rewrite": n * [{}]} for n in (1, 3)]
    old = point(4, 0.9, 0.4, 0.8) | {"records": asked}  # two of four records asked, of two edits each
    write_tables([result("rome", [told]), result("memit", [old])], tmp_path)
    rows = [line.split(" | ") for line in (tmp_path / "tables.md").read_text().splitlines() if line.startswith("| ")]
    assert {row[0].strip("| "): row[4] for row in rows[2:]} == {"rome": "0.50", "memit": "1.00"}


def test_records_are_counted_of_what_is_shown(tmp_path: Path) -> None:
    one = result("rome_x", [point(1, 0.9, 0.4, 0.8)])
    metrics = one["points"][0]["metrics"]
    metrics["reliability/2_hops/token_accuracy"] = metrics["reliability/token_accuracy"] | {"records": 2}
    write_tables([one], tmp_path)
    assert "over 4 records" in (tmp_path / "tables.md").read_text()
    metrics["generality/token_accuracy"]["records"] = 3
    write_tables([one], tmp_path)
    assert "over 3 to 4 records" in (tmp_path / "tables.md").read_text()


def test_tables_say_when_and_on_what_and_what_is_left(tmp_path: Path) -> None:
    left = result("kn", [point(100, 0, 0, 0)])
    del left["points"]
    made = {"date": "2026-11-27T12:00:00+00:00", "hardware": "AMD EPYC, 1 thread"}
    later = made | {"date": "2026-11-29T12:00:00+00:00"}
    write_tables([r | made for r in results()[:3]] + [results()[4] | later, left], tmp_path)
    first, second = (tmp_path / "tables.md").read_text().split("## ")[1:]
    assert "2026-11-27, on AMD EPYC, 1 thread." in first
    assert "Not run" not in first
    assert "2026-11-27 to 2026-11-29, on AMD EPYC, 1 thread." in second
    assert "Not run yet: kn." in second
    write_tables(results(), tmp_path)  # cells of before say nothing
    assert " on " not in (tmp_path / "tables.md").read_text()


def test_tables_say_whose_seconds_lack_the_search_of_values(tmp_path: Path) -> None:
    kept, anew = ({"facts": {"init_args": {"values": values}}} for values in ({"keep": True}, {"keep": False}))
    some = [result("memit", [point(1, 0.8, 0.6, 0.7)], **kept), result("rome", [point(1, 0.8, 0.6, 0.7)], **anew)]
    write_tables(some, tmp_path)
    lines = (tmp_path / "tables.md").read_text().splitlines()
    assert [line.rpartition(": ")[2] for line in lines if "found once" in line] == ["memit."]
    write_tables(some[1:], tmp_path)
    assert "found once" not in (tmp_path / "tables.md").read_text()


def test_fluency_is_no_percent(tmp_path: Path) -> None:
    one = point(1, 0.9, 0.4, 0.8)
    one["metrics"] = {FLUENCY: {"value": 6.2, "ci": [6.1, 6.3], "records": 4}}
    write_tables([result("rome", [one])], tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| rome | 620.0 (610-630) |" in text
    assert "GE: entropy of the bigrams and trigrams of greedy texts, in hundredths of bits" in text
    assert "RS:" not in text
    write_tables(results(), tmp_path)
    assert "GE:" not in (tmp_path / "tables.md").read_text()


def test_failures_are_told_where_every_cell_failed(tmp_path: Path) -> None:
    failed = [result("rome", [point(100, 0, 0, 0)]), result("ft", [], mode="consecutive", batch=8, edits=[10, 20])]
    for one in failed:
        del one["points"]
        one["error"] = "ValueError: too long"
    left = {**failed[0], "editor": "kn"}
    del left["error"]
    write_tables([*failed, left], tmp_path)
    first, *others = (tmp_path / "tables.md").read_text().split("## ")[1:]
    assert first.splitlines()[::2] == [
        "facts, batch, 100 edits",
        "rome failed: ValueError: too long",
        "Not run yet: kn.",
    ]
    assert [t.partition("\n")[0] for t in others] == [f"facts, consecutive by 8, {n} edits" for n in (16, 20)]
    assert all("ft failed: ValueError: too long" in text for text in others)
    assert "tabular" not in (tmp_path / "tables.tex").read_text()


def test_runs_that_differ_are_not_put_together(tmp_path: Path) -> None:
    some = [
        result("rome", [point(100, 0.9, 0.4, 0.8)]),
        result("rome", [point(100, 0.5, 0.4, 0.8)], asked=20),
        result("rome", [point(1, 0.4, 0.4, 0.8)], mode="single", edits=[50]),
        result("rome", [point(1, 0.3, 0.4, 0.8)], mode="single", edits=[20]),
        result("rome", [point(10, 0.2, 0.4, 0.8)], mode="consecutive", batch=5),
        result("rome", [point(10, 0.1, 0.4, 0.8)], mode="consecutive", batch=10),
    ]
    write_tables(some, tmp_path)
    titles = [line[3:] for line in (tmp_path / "tables.md").read_text().splitlines() if line.startswith("## ")]
    assert titles == [
        "facts, batch, 100 edits, all asked",
        "facts, batch, 100 edits, 20 asked",
        "facts, single, single edits, run of 50 records",
        "facts, single, single edits, run of 20 records",
        "facts, consecutive by 5, 10 edits",
        "facts, consecutive by 10, 10 edits",
    ]
    over, between = over_number(some), trade(some)
    assert over is not None
    assert between is not None
    drawn = [list(line.get_ydata()) for line in over.axes[0].lines]
    assert [line for line in drawn if line] == [[0.9], [0.5], [0.4], [0.3], [0.2], [0.1]]
    assert [axes.get_title() for axes in between.axes][:2] == ["100, batch, all asked", "100, batch, 20 asked"]
    assert [axes.get_title() for axes in between.axes][4:] == ["10, consecutive, by 5", "10, consecutive, by 10"]
    write_csv(some, tmp_path / "r.csv")
    with (tmp_path / "r.csv").open() as file:
        assert [line["asked"] for line in csv.DictReader(file)][:6] == 3 * [""] + 3 * ["20"]
    write_answers(some, tmp_path / "a.html")
    assert "<h2>facts, batch, 100 edits, 20 asked</h2>" in (tmp_path / "a.html").read_text()


def test_what_is_no_number_is_shown_as_none(tmp_path: Path) -> None:
    given = results()
    for one in (given[1], given[2]):  # rome_x, as its cells are read from their files
        one["points"][0]["metrics"]["reliability/token_accuracy"] |= {"value": None, "ci": [None, None]}
    write_tables(given, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| rome_x | nan (nan-nan) | 40.0 (30-50) |" in text
    assert "| memit | **80.0 (70-90)** |" in text
    write_csv(given, tmp_path / "r.csv")
    assert "rome_x,default,reliability/token_accuracy,nan,nan,nan,4" in (tmp_path / "r.csv").read_text()
    over = over_number(given)
    assert over is not None
    line = next(line for line in over.axes[0].lines if line.get_label() == "rome_x")
    assert all(value != value for value in line.get_ydata())


def test_figures_of_what_there_is(tmp_path: Path) -> None:
    write_figures(results(), tmp_path)
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["facts-cost.png", "facts-edits.png", "facts-trade.png"]
    over, between, costs = over_number(results()), trade(results()), cost(results())
    assert over is not None
    assert between is not None
    assert costs is not None
    lines = {line.get_label(): list(line.get_ydata()) for line in over.axes[0].lines}
    assert lines == {"unedited": [0.1], "rome_x": [0.9, 0.5], "memit": [0.8, 0.7]}
    assert [a.get_title() for a in between.axes] == ["1, batch", "100, batch"]
    assert [bar.get_width() for bar in costs.axes[0].patches] == [2.0, 2.0]
    assert over_number(results()[:2]) is None  # one number of edits is no curve
    assert trade([]) is None
    assert cost([]) is None


def test_an_editor_without_a_metric_leaves_its_panel_to_the_others() -> None:
    found = results()
    for given in found[0]["points"]:  # the first one that is drawn
        del given["metrics"]["generality/token_accuracy"]
    figure = over_number(found)
    assert figure is not None
    panel = next(axes for axes in figure.axes if axes.get_title() == "Generality")
    assert panel.yaxis.get_units() is None  # an axis of numbers, not of categories
    assert next(list(line.get_ydata()) for line in panel.lines if line.get_label() == found[0]["editor"]) == []


def test_single_edits_begin_the_curve_of_batches() -> None:
    found = [
        result("memit", [point(1, 0.8, 0.6, 0.7)], mode="single"),
        result("memit", [point(100, 0.7, 0.3, 0.9)]),
        result("grace", [point(1, 0.5, 0.3, 0.2)], mode="single"),
    ]
    figure = over_number(found)
    assert figure is not None
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[0].lines}
    assert lines == {"memit": [0.8, 0.7], "grace": [0.5], "batch": [], "single": []}


@pytest.mark.parametrize(
    ("general", "local", "titles"),
    [
        ("counterfact/PS", "counterfact/NS", ("rephrases, PS", "neighbours, NS")),
        ("zsre/paraphrase", "zsre/specificity", ("Paraphrase", "Spec")),
    ],
)
def test_generality_against_locality_of_published_protocols(general: str, local: str, titles: tuple[str, str]) -> None:
    one = point(1, 0, 0, 0)
    value = one["metrics"]["reliability/token_accuracy"]
    one["metrics"] = {general: value | {"value": 0.6}, local: value | {"value": 0.3}}
    figure = trade([result("memit", [one])])
    assert figure is not None
    (axes,) = figure.axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [([0.6], [0.3])]
    assert axes.get_xlabel() == titles[0]
    assert axes.get_ylabel().startswith(titles[1])


def test_answers_are_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    write_answers(results(), tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<h2>") == 2
    assert "A &amp; B is" in page
    assert "&lt;b&gt;" in page
    assert '<td>&lt;b&gt;</td><td class="right">Lyon, of course</td>' in page
    assert '<td class="right same">same</td>' in page
    assert "http" not in page
    assert "src=" not in page


def test_kinds_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Parts of the metrics that are shown; not those of other measures."""
    some, other = point(1, 0.9, 0.4, 0.8), point(1, 0.8, 0.6, 0.7)
    parts = {"portability/token_accuracy": 0.5, "portability/two_hops/token_accuracy": 0.25}
    parts |= {"portability/alias/token_accuracy": 0.75, "portability/alias/exact_match": 0.1}
    some["metrics"] |= {m: {"value": v, "ci": [v, v], "records": 2} for m, v in parts.items()}
    write_tables([result("rome_x", [some]), result("memit", [other])], tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert text.count("## ") == 2
    assert text.partition("## facts, batch, single edits, by kind")[2].strip().splitlines() == [
        "| Editor | portability: alias | portability: two hops |",
        "| --- | ---: | ---: |",
        "| rome_x | **75.0 (75-75)** | **25.0 (25-25)** |",
        "| memit | - | - |",
    ]
    assert "single edits, by kind" in (tmp_path / "tables.tex").read_text()


def test_time_left_is_told_of_cells_that_take_long() -> None:
    """Rich's own estimate looks back half a minute, in which a cell of hours tells nothing."""
    now = [0.0]
    shown = Progress(get_time=lambda: now[0], disable=True)
    task = shown.add_task("", total=1000)
    now[0] = 7200.0
    assert _clock(shown.tasks[0]) == " (2:00:00)"
    shown.update(task, completed=250)
    assert _clock(shown.tasks[0]) == " (2:00:00, about 6:00:00 left)"


def test_seconds_that_say_nothing_are_not_shown(tmp_path: Path) -> None:
    """Value vectors that an earlier cell found; and what another machine took is told apart."""
    kept = {"init_args": {"values": {"keep": True}}}
    some = [
        result("ft_m", [point(1, 0.9, 0.4, 0.8)], date="2026-11-28T10:00", hardware="a card"),
        result("memit", [point(1, 0.8, 0.6, 0.7)], facts=kept, date="2026-11-27T10:00", hardware="a processor"),
    ]
    write_tables(some, tmp_path)
    text = (tmp_path / "tables.md").read_text()
    ends = {line.split(" | ")[0][2:]: line.split(" | ")[-2] for line in text.splitlines() if line.startswith("| ")}
    assert (ends["ft_m"], ends["memit"]) == ("2.00", "-")
    assert "a run's seconds tell nothing: memit." in text
    assert "2026-11-27 to 2026-11-28, on a card (ft_m); a processor (memit). Seconds and memory of different" in text
    (figure,) = [cost(some)]
    assert figure is not None
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ft_m"]
