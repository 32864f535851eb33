"""Put a task to a model, and compare what two models made of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from modules.ability.task import Example, Task
from modules.editor import Edited
from modules.meter import now
from modules.metrics import from_file, summarise

BATCHES = 8  # of examples that are asked in one go


def measure(
    edited: Edited,
    task: Task,
    examples: Sequence[Example],
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Ask a model all examples and judge its answers.

    Args:
        examples: see `modules.ability.task.drawn`.
        seed: of the bootstrap.
        progress: called with the number of examples done since the last call.

    Returns:
        JSON values: `metrics` {metric: {value, ci, records}}, with percentile bootstrap intervals over examples, and
        `examples`, one each in the order given: id, the right answers, what the model answered, values.

    Raises:
        ValueError: without examples, or where one does not fit the context window beside the edits.
    """
    if not examples:
        raise ValueError(f"{task.name}: no examples to ask")
    start = now(edited.backbone)
    # prompts that begin alike together, so that this is read once (`modules.prefixes`)
    order = sorted(range(len(examples)), key=lambda i: examples[i].prompt)
    groups = [order[at : at + BATCHES * batch_size] for at in range(0, len(order), BATCHES * batch_size)]
    groups.sort(key=lambda group: -max(len(examples[i].prompt) for i in group))  # what fails, fails soon
    found: dict[int, dict[str, Any]] = {}
    for places in groups:
        some = [examples[i] for i in places]
        for i, example, answer in zip(places, some, task.answers(edited, some, batch_size), strict=True):
            values = task.judge(example, answer)
            found[i] = {"id": example.id, "right": list(example.answers), **answer, "values": values}
        if progress:
            progress(len(some))
    each = [found[i] for i in range(len(examples))]
    return {
        "metrics": task.aggregate([one["values"] for one in each], seed),
        "examples": each,
        "seconds": now(edited.backbone) - start,
    }


def change(before: Mapping[str, Any], after: Mapping[str, Any], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Metric -> {value, ci, records}: the mean difference of two results of `measure` on the same examples.

    The interval is the bootstrap of each example's own difference, so it is narrower than those of the two means. A
    metric that is no mean over examples has no such change.

    Raises:
        ValueError: where the examples are not the same.
    """
    if [e["id"] for e in before["examples"]] != [e["id"] for e in after["examples"]]:
        raise ValueError("a change needs two results on the same examples")
    differences = [
        {"post": {m: from_file(v) - from_file(b["values"][m]) for m, v in a["values"].items() if _number(b, m, v)}}
        for b, a in zip(before["examples"], after["examples"], strict=True)
    ]
    return summarise(differences, seed, values=lambda post: post)


def _number(before: Mapping[str, Any], metric: str, value: Any) -> bool:
    return metric in before["values"] and (value is None or isinstance(value, (int, float)))
