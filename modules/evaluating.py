"""A model as it answers, for the length of a `with`."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout and no recomputation, which would throw cached keys away; each part's mode is put back after, since a
    frozen one may be in eval mode by itself."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
