"""Data on disk, and a run with all callbacks."""

from typing import Any

import pytest
from callback_runs import everything, fit

from trainers.callbacks import selection_figures
from trainers.drawing.selection import heat_map


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("arrow")


@pytest.fixture(scope="session", params=["qk", "hidden"])
def run(request, tmp_path_factory, cache):
    """A run with all callbacks, of either selection, and its heat maps."""
    figures = []

    def keep(*args: Any) -> Any:
        figures.append(heat_map(*args))
        return figures[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection_figures, "heat_map", keep)
        found = fit(tmp_path_factory.mktemp(request.param), cache, everything(), request.param)
    found.selection, found.figures = request.param, figures
    return found
