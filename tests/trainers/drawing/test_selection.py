"""The figures of selection: what they show, and that nothing of them lies on something else."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import Rectangle

from modules.gist.analysis import Selection, profile
from modules.gist.analysis_traces import Place
from trainers.drawing.selection import MOST_TOKENS, heat_map, layer_profile, place_figure, token_trace
from trainers.drawing.style import GOLDEN

EDITS = ["Lyon", "a subject with a very long name", "$x_1$"]


def selection(layers: int = 2, tokens: int = 5, golden: int | None = 1, right: bool | None = True) -> Selection:
    torch.manual_seed(0)
    probabilities = torch.randn(layers, tokens, len(EDITS) + 1).softmax(-1)
    names = [f"t{i}" for i in range(tokens)]
    hits = None if right is None else [True, right]
    return Selection(names, probabilities, tokens - 2, golden, hits, "Where? → There", "It.")


def panels(figure):
    return [a for a in figure.axes if a.get_images() and a.get_title()]


def frames(axes):
    return [p for p in axes.patches if isinstance(p, Rectangle) and p.get_label() == "golden"]


def test_heat_map_has_a_panel_per_layer_with_its_values():
    shown = selection(layers=7)
    figure = heat_map(shown, EDITS, [f"layer {i}" for i in range(4, 11)], columns=4)
    axes = panels(figure)
    assert [a.get_title() for a in axes] == [f"layer {i}" for i in range(4, 11)]
    for i, a in enumerate(axes):
        torch.testing.assert_close(torch.tensor(a.get_images()[0].get_array().data), shown.probabilities[i])
        assert a.get_images()[0].get_clim() == (0, 1)  # every panel on one scale
    labelled = [any(t.get_visible() and t.get_text() for t in a.get_xticklabels()) for a in axes]
    assert labelled == [False] * 3 + [True] * 4  # the lowest of each column, also where nothing stands below it
    assert any(a.get_ylabel() == "probability of reading" for a in figure.axes)  # the colour bar


def test_heat_map_marks_the_golden_edit_and_the_answer():
    axes = panels(heat_map(selection(golden=1), EDITS, ["a", "b"]))[0]
    (frame,) = frames(axes)
    assert (frame.get_x(), frame.get_width(), frame.get_height()) == (0.5, 1, 5)
    names = axes.get_xticklabels()
    assert [n.get_text() for n in names] == ["Lyon", "a subject wit…", "$x_1$", "zero-gist"]
    assert [n.get_color() == GOLDEN for n in names] == [False, True, False, False]
    assert not names[2].get_parse_math()  # a $ in a name is no formula
    assert [t.get_text() for t in axes.get_yticklabels() if t.get_fontweight() == "bold"] == ["t3", "t4"]


def test_heat_map_out_of_scope_marks_no_edit():
    figure = heat_map(selection(golden=None, layers=1), EDITS, ["all active layers"])
    assert len(panels(figure)) == 1
    assert not frames(panels(figure)[0])
    assert "about none of the edits" in figure.get_suptitle()


def test_heat_map_of_a_long_query_shows_its_end():
    axes = panels(heat_map(selection(layers=1, tokens=100), EDITS, ["all"]))[0]
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert (len(names), names[-1]) == (MOST_TOKENS, "t99")
    assert [t.get_text() for t in axes.get_yticklabels() if t.get_fontweight() == "bold"] == ["t98", "t99"]


def test_labels_do_not_overlap():
    names = [f"a long subject {i}" for i in range(24)]
    wide = Selection([f"token{i}" for i in range(20)], torch.full((4, 20, 25), 0.04), 18, 0)
    figure = heat_map(wide, names, list("abcd"))
    figure.draw_without_rendering()
    for axes in panels(figure):
        for labels, side in ((axes.get_xticklabels(), "x"), (axes.get_yticklabels(), "y")):
            boxes = [t.get_window_extent() for t in labels if t.get_visible() and t.get_text()]
            spans = sorted((getattr(b, side + "0"), getattr(b, side + "1")) for b in boxes)
            assert all(end <= start + 0.5 for (_, end), (start, _) in pairwise(spans))


def test_profile_is_the_mean_over_answer_tokens_then_queries():
    short, long = selection(tokens=4), selection(tokens=9, golden=0)
    found = profile([short, long])
    golden = (short.probabilities[:, 2:, 1].mean(1) + long.probabilities[:, 7:, 0].mean(1)) / 2
    zero = (short.probabilities[:, 2:, 3].mean(1) + long.probabilities[:, 7:, 3].mean(1)) / 2
    torch.testing.assert_close(found.golden, golden)
    torch.testing.assert_close(found.zero, zero)
    even = Selection(["a"], torch.full((1, 1, 4), 0.25), 0)
    torch.testing.assert_close(profile([even]).entropy, torch.tensor([math.log(4)]))  # nats
    with pytest.raises(ValueError, match="at least one"):
        profile([])


def test_layer_profile_draws_both_scopes():
    inside, outside = profile([selection(layers=3)]), profile([selection(layers=3, golden=None)])
    figure = layer_profile([5, 6, 7], inside, outside)
    zero, golden, entropy = figure.axes
    assert [len(a.lines) for a in figure.axes] == [2, 1, 2]  # out of scope there is no golden gist
    assert list(zero.lines[0].get_xdata()) == [5, 6, 7]
    for axes, values in ((zero, inside.zero), (golden, inside.golden), (entropy, inside.entropy)):
        torch.testing.assert_close(torch.tensor(axes.lines[0].get_ydata()), values)
    assert [a.get_xlabel() for a in figure.axes] == ["layer"] * 3
    assert "nats" in entropy.get_ylabel()
    assert max(entropy.lines[1].get_ydata()) < entropy.get_ylim()[1]
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["in scope", "out of scope"]


def test_layer_profile_of_a_shared_choice_is_level_and_says_so():
    figure = layer_profile([5, 6, 7], profile([selection(layers=1)]))
    assert len(set(figure.axes[0].lines[0].get_ydata())) == 1
    assert "one choice for all layers" in figure.get_suptitle()


def test_token_trace_is_the_mean_over_layers():
    right, wrong = selection(), selection(tokens=8, right=False)
    figure = token_trace([right, wrong])
    above, other, below, _ = figure.axes
    torch.testing.assert_close(torch.tensor(above.lines[0].get_ydata()), right.probabilities[..., 1].mean(0))
    torch.testing.assert_close(torch.tensor(other.lines[1].get_ydata()), wrong.probabilities[..., 3].mean(0))
    assert [t.get_text() for t in below.get_xticklabels()] == right.tokens
    assert ["right" in above.get_title(), "wrong" in other.get_title()] == [True, True]
    grounds = [p for p in above.patches if p.get_facecolor() == to_rgba("#EEEEEE")]
    assert [(p.get_x(), p.get_width()) for p in grounds] == [(2.5, 2)]
    assert len(token_trace([right]).axes) == 2


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


def test_pyplot_is_left_alone():
    heat_map(selection(), EDITS, ["a", "b"])
    pyplot = sys.modules.get("matplotlib.pyplot")
    assert pyplot is None or not pyplot.get_fignums()
