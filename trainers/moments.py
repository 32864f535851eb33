"""Second moments of a model's layers: `python -m trainers.moments --backbone.source NAME --layers 13,14`."""

import sys

from modules.backbone import BackboneConfig, load_backbone
from modules.training_free.locate import down_name, layer_numbers
from modules.training_free.metrics import bar
from modules.training_free.second_moments import Moments, null_space, second_moments
from trainers.command import run
from trainers.workers import device_named


def moments(
    backbone: BackboneConfig,
    layers: list[int | float],
    moments: Moments | None = None,
    null_space_below: float | None = None,
    relative: bool = False,
    device: str = "auto",
) -> None:
    """Take the second moments that ROME, MEMIT and others need, once, and say where they are kept.

    Args:
        backbone: the language model.
        layers: decoder layers, by number or as parts of the depth: the inputs of their MLP's last projection.
        moments: over which text, and where they are kept.
        null_space_below: also make AlphaEdit's projection, by this threshold, and say what it leaves to edits.
        relative: that threshold is in units of the mean second moment.
        device: cpu, cuda, cuda:1; auto: the first GPU where there is one.
    """
    options, place = moments or Moments(), device_named(device)
    model = load_backbone(backbone)
    names = [down_name(model, i) for i in layer_numbers(model, layers)]
    model.model.to(place)  # type: ignore[arg-type]
    found = second_moments(model, names, options, bar())
    for name in names:
        matrix = found[name]
        print(f"{name}: {len(matrix)} inputs, mean square {float(matrix.diagonal().mean()):.4g}")
        print(f"  {options.file(model, name)}")
        if null_space_below is not None:
            _, rank = null_space(model, name, options, null_space_below, relative)
            print(f"  null space: {rank} of {len(matrix)} directions ({rank / len(matrix):.1%})")
    print(f"text: {options.text}", file=sys.stderr)


if __name__ == "__main__":
    run(moments)
