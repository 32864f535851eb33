"""Look-ups in a memory of many edits.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_memory_lookup.py [--edits 100000] [--queries 200] [--encode 256]

Edits are generated: subjects of two or three made-up words, some of several edits, over a dozen relations. Vectors are
random, so that 100,000 edits need not be encoded; the real encoder's speed is measured apart, on `--encode` statements
(0: not at all). Times are of the processor, so that other work on the machine hardly counts.
"""

import argparse
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from datamodules.records import EditRequest
from modules.memory import EditMemory, EncoderConfig, SentenceEncoder, retrieve

RELATIONS = (
    "The capital of {} is", "{} is located in", "The mother tongue of {} is", "{} was founded by", "{} plays for",
    "The head of {} is", "{} works as", "{} was born in", "The currency of {} is", "{} belongs to", "{} is famous for",
    "The twin of {} is",
)  # fmt: skip


class RandomVectors:
    """An encoder of no meaning and no cost."""

    name, width = "random", 384

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        return F.normalize(torch.randn(len(texts), self.width, generator=self.generator), dim=-1)


def generated(count: int, draw: random.Random) -> list[EditRequest]:
    """Distinct edits; about one subject in ten has several."""
    syllables = [a + b for a in "bcdfghklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "or", "el")]
    common = ["the", "of", "saint", "new", "river", "north"]

    def name() -> str:
        made = ["".join(draw.choices(syllables, k=draw.randint(2, 4))) for _ in range(draw.randint(1, 2))]
        return " ".join([*draw.sample(common, draw.randint(0, 1)), *made]).title()

    edits: dict[str, EditRequest] = {}
    while len(edits) < count:
        subject = name()
        for relation in draw.sample(RELATIONS, draw.choice([1] * 9 + [4])):
            edits.setdefault(relation.format(subject), EditRequest(relation.format(subject), name(), subject))
    return list(edits.values())[:count]


def timed(run: Callable[[Any], Any], queries: Sequence[Any]) -> list[float]:
    """Milliseconds of each call."""
    found = []
    for query in queries:
        start = time.process_time()
        run(query)
        found.append(1000 * (time.process_time() - start))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"edits": 100_000, "queries": 200, "encode": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--encoder", default=EncoderConfig().source)
    args = parser.parse_args()
    draw = random.Random(0)
    edits = generated(args.edits, draw)
    memory = EditMemory(RandomVectors())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    once = {"add all": timed(memory.add, [edits])}
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory.vectors()
    some = draw.sample(edits, args.queries)
    prompts = [edit.prompt for edit in some]
    named = [f"Somebody who once asked about {edit.subject}'s past was told that" for edit in some]
    unrelated = [f"Nobody who ever asked about {i} was told that it is of any use" for i in range(len(some))]
    batches = [named[at : at + 64] for at in range(0, len(named) - 63, 64)]
    mixed = list(zip(prompts, named, unrelated, strict=True))
    rows = {
        "exact": timed(memory.exact, prompts),
        "of_subject": timed(memory.of_subject, named),
        "of_subject, none in the query": timed(memory.of_subject, unrelated),
        "nearest 10": timed(lambda query: memory.nearest([query], 10), named),
        "nearest 10, each of 64 at once": [t / 64 for t in timed(lambda some: memory.nearest(some, 10), batches)],
        "retrieve, each of 3 sorts": [t / 3 for t in timed(lambda some: retrieve(memory, some), mixed)],
        "remove one": timed(lambda edit: memory.remove([edit]), some),
        "add one": timed(lambda edit: memory.add([edit]), some),
    }
    with tempfile.TemporaryDirectory() as folder:
        once["save"] = timed(lambda f: memory.save(Path(f)), [folder])
        once["load"] = timed(lambda f: EditMemory.load(Path(f), RandomVectors()), [folder])
    once["copy"] = timed(lambda _: memory.copy(), [0])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {vars(args)}")
    print(f"index of {len(memory)} edits: {(after - before) / 1024:.0f} MiB")
    for name, times in rows.items():
        print(f"{name:32s} median {statistics.median(times):8.3f} ms   largest {max(times):8.3f} ms")
    for name, times in once.items():
        print(f"{name:32s} {times[0] / 1000:15.3f} s")
    if args.encode:
        encoder = SentenceEncoder(EncoderConfig(args.encoder))
        encoder(["Load the model."])
        [spent] = timed(encoder, [[edit.statement for edit in edits[: args.encode]]])
        one = statistics.median(timed(lambda query: encoder([query]), named[:20]))
        print(f"encoding: {1000 * args.encode / spent:.0f} statements a second; one query {one:.1f} ms")


if __name__ == "__main__":
    main()
