"""The figure of aligned temperatures."""

import pytest

from modules.gist.analysis_temperature import Aligned
from trainers.drawing.temperature import temperature_figure


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
