"""What comes into a layer in passes over the same rows, held so that the next passes over them begin there.

MEMIT and its kin edit layers from below upwards and read all prompts again for each: what stands below the layer that
was edited last is as it was.

B rows of a pass, T tokens, d hidden width.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from modules.backbone import Backbone
from modules.from_layer import Entering, from_layer

ROOM = 2**30  # bytes; 1,000 edits in 6 contexts of 20 tokens take 0.3 GB in SmolLM2-135M, and 0.9 GB in Qwen2.5-7B


@dataclass
class Held:
    """What came into a layer in the last passes over the same rows.

    Args:
        layer: into which what comes is held from now on; each time one that is above the last. Nothing below the layer
            that was named last may have changed by the next pass.
        room: bytes that may be held. Passes that do not fit begin at the embedding, as the first ones do.
    """

    layer: int = 0
    room: int = ROOM
    found: dict[int, tuple[int, Entering]] = field(default_factory=dict)  # by the pass: the layer, and [B, T, d]

    @contextmanager
    def reading(self, backbone: Backbone, number: int) -> Iterator[None]:
        """One of the passes, by its number, for the length of a `with`."""
        layers, layer = backbone.layers, self.layer
        new: list[Entering] = []

        def keep(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            new.append(Entering(hidden.detach(), isinstance(output, tuple)))

        start, known = self.found.get(number, (0, None))
        # what comes into the first layer is no work to find
        handle = layers[layer - 1].register_forward_hook(keep) if layer else None
        try:
            with from_layer(layers, start, lambda: known.hidden, known.tupled) if known else nullcontext():
                yield
        finally:
            if handle:
                handle.remove()
        used = sum(one.hidden.nbytes for i, (_, one) in self.found.items() if i != number)
        if new and used + new[0].hidden.nbytes <= self.room:
            self.found[number] = layer, new[0]
