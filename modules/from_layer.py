"""Passes of a model that begin at one of its layers, with what is known to come into it.

L rows, T tokens, d hidden width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Entering(NamedTuple):
    """What came into a layer in a pass.

    Args:
        hidden: [L, T, d], without gradient.
        tupled: the layer returns a tuple.
    """

    hidden: Tensor
    tupled: bool


@contextmanager
def entering(layer: nn.Module) -> Iterator[list[Entering]]:
    """What comes into a layer in each pass within a `with`."""
    seen: list[Entering] = []

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        seen.append(Entering(hidden.detach(), isinstance(output, tuple)))

    handle = layer.register_forward_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def from_layer(layers: Sequence[nn.Module], start: int, hidden: Callable[[], Tensor], tupled: bool) -> Iterator[None]:
    """Layers below `start` compute nothing for the length of a `with`; the last of them hands on `hidden()`.

    Args:
        layers: all decoder layers of a model.
        tupled: they return tuples.
    """
    if start == 0:
        handle = layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: _with_input(args, kwargs, hidden()), with_kwargs=True
        )
        try:
            yield
        finally:
            handle.remove()
        return

    def hand_on(last: bool) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = hidden() if last else args[0] if args else kwargs["hidden_states"]
            return (given, None) if tupled else given

        return forward

    below = layers[:start]
    own = [vars(layer).get("forward") for layer in below]
    try:
        for i, layer in enumerate(below):
            layer.forward = hand_on(i == start - 1)
        yield
    finally:
        for layer, forward in zip(below, own, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _with_input(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})
