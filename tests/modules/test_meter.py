"""What a piece of work costs, as the meter has it."""

from collections.abc import Callable

import pytest
import torch

from modules.backbone import Backbone
from modules.meter import Meter

MIB = 2**20


def test_the_peak_is_of_one_piece_of_work(tiny: Callable[..., Backbone]) -> None:
    meter = Meter(tiny(), every=0.001)
    kept = []
    with meter.running():
        kept.append(torch.ones(64 * MIB // 4))
    assert 60 * MIB < meter.peak < 90 * MIB
    seconds = meter.seconds
    assert seconds > 0
    with meter.running():  # what was held before does not count
        kept.append(torch.ones(16 * MIB // 4))
    assert 60 * MIB < meter.peak < 90 * MIB
    assert meter.seconds > seconds


def test_memory_that_is_given_back_within_counts(tiny: Callable[..., Backbone]) -> None:
    meter = Meter(tiny(), every=0.001)
    with meter.running():
        for _ in range(5):
            torch.ones(64 * MIB // 4).sum()  # gone after each
    assert 60 * MIB < meter.peak < 130 * MIB


def test_work_that_fails_does_not_count(tiny: Callable[..., Backbone]) -> None:
    meter = Meter(tiny())
    with pytest.raises(RuntimeError, match="allocate memory"), meter.running():
        torch.ones(2**48)
    assert (meter.seconds, meter.peak) == (0.0, 0)
