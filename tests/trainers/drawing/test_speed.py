"""The figure of what edits cost."""

from speed_rows import ROWS

from modules.speed import Measured
from trainers.drawing.speed import speed_figure
from trainers.drawing.style import GOLDEN


def test_speed_figure() -> None:
    encoding, token, kept, accuracy = speed_figure(ROWS).axes
    values = {line.get_label(): list(line.get_ydata()) for line in encoding.lines}
    assert values["incomes"] == [0.5, 60.0]
    assert values["icl"] == [2.0]
    stopped = next(line for line in encoding.lines if line.get_label() == "icl: could not")
    assert list(stopped.get_xdata()) == [10000, 10000]
    assert stopped.get_color() != GOLDEN
    assert list(token.lines[0].get_ydata()) == [10.0, 15.0]
    assert encoding.get_yscale() == kept.get_yscale() == "log"
    assert list(kept.lines[-1].get_ydata()) == []  # nothing kept has no place on a logarithmic axis
    assert [list(line.get_ydata()) for line in accuracy.lines[:2]] == [[0.9], [0.8]]


def test_speed_figure_of_one_number_of_edits() -> None:
    axes = speed_figure([*ROWS[:3], Measured("kn", 100, False, error="no")]).axes
    assert [panel.get_title() for panel in axes[:2]] == ["encoding, seconds", "prompt, ms"]
    assert [bar.get_width() for bar in axes[1].patches] == [20.0, 40.0, 20.0, 0.0]
    assert [text.get_text() for text in axes[1].texts] == [" -"]
    assert axes[0].get_xscale() == "log"
