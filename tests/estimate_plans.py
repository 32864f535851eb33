"""Plans of small and large models for the dry run, and what a real step of them allocates."""

import json
from collections.abc import Callable
from typing import Any, cast

from torch.profiler import ProfilerActivity, profile

from trainers.estimate import named
from trainers.estimate.command import parsed
from trainers.estimate.plan import Plan, plan_of

MODEL = "--model.init_args."
QWEN7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
}
WIDE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}


def random_source(kind: str, shape: dict[str, Any]) -> list[str]:
    return [f"{MODEL}backbone.source=random:{kind}", f"{MODEL}backbone.overrides={json.dumps(shape)}"]


def wide(*more: str) -> list[str]:
    return ["--config=incomes_tiny.yaml", *random_source("llama", WIDE), *more]


def tiny_plan(*more: str, gpus: int = 1, card: str = "cpu") -> Plan:
    return plan_of(parsed(["--config=incomes_tiny.yaml", *more]), gpus, named(card))


def most_allocated(step: Callable[[], object], held: int) -> int:
    """The most bytes that tensors hold at a time during a step, by torch's own profiler, of which `held` were there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    now = most = held
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += cast(Any, event).nbytes()
        most = max(most, now)
    return most
