"""What to change in a run that does not fit, and what each change would save."""

from collections.abc import Iterator
from dataclasses import dataclass

import yaml

from trainers.cli import find_config
from trainers.estimate.cards import GIB
from trainers.estimate.families import MODEL
from trainers.estimate.plan import Plan, Sharding, records_of, sharding_of
from trainers.estimate.totals import Estimate, estimate_plan
from trainers.strategies import Zero

SHOWN = 3  # changes that are shown, of those that are enough


class DoesNotFit(ValueError):
    """A run that needs more memory than there is; the message says what to change."""


@dataclass(frozen=True)
class Remedy:
    """A change, as arguments of the command line, and what the run needs with it.

    Args:
        saves: bytes, against the run before this change.
    """

    arguments: str
    saves: int
    found: Estimate


def refuse(found: Estimate) -> None:
    """Nothing for a run that fits.

    Raises:
        DoesNotFit: naming what needs most, and the changes that help most; each was estimated, not guessed.
    """
    if found.fits:
        return
    largest = sorted(found.components.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} {size / GIB:.1f}" for name, size in largest)
    lines = [
        f"the run does not fit: {found.moment} needs {found.total / GIB:.1f} GiB ({named} ...), and "
        f"{found.plan.card.name} has {found.capacity / GIB:.1f} GiB for it"
    ]
    alone = enough(found)
    advice = alone or together(found)
    if advice:
        lines.append("Each of these is enough:" if alone else "No change alone is enough. Together, in this order:")
    lines += [
        f"  {remedy.arguments}   saves {remedy.saves / GIB:.1f} GiB, then {remedy.found.total / GIB:.1f} GiB"
        for remedy in (advice if advice and advice[-1].found.fits else advice[:SHOWN])
    ]
    if not advice or not advice[-1].found.fits:
        least = advice[-1].found.total if advice else found.total
        lines.append(
            f"No changes known here bring it below {least / GIB:.1f} GiB, which is still too much: take a larger card, "
            "more of them, shorter texts, or a smaller model"
        )
    raise DoesNotFit("\n".join(lines))


def enough(found: Estimate) -> list[Remedy]:
    """Up to three changes of which each makes the run fit, those that change least first."""
    chosen: list[Remedy] = []
    for remedy in _each(found):
        smaller = remedy.found.plan.records < found.plan.records
        again = smaller and any(other.found.plan.records < found.plan.records for other in chosen)
        if remedy.found.fits and not again:
            chosen.append(remedy)
        if len(chosen) == SHOWN:
            break
    return chosen


def together(found: Estimate) -> list[Remedy]:
    """Changes to be made together, the one that saves most first, until the run fits or none saves a fiftieth. What is
    trained changes only where nothing else does."""
    chosen: list[Remedy] = []
    now = found

    def worth(remedy: Remedy) -> tuple[bool, bool, int]:
        plan = remedy.found.plan
        same = plan.family.what(plan.module) == plan.family.what(now.plan.module)
        return remedy.found.fits, same and remedy.saves > now.total // 50, remedy.saves

    while not now.fits:
        best = max(_each(now), key=worth, default=None)
        if best is None or not (best.found.fits or best.saves > now.total // 50):
            break
        chosen, now = [*chosen, best], best.found
    return chosen


def _each(found: Estimate) -> Iterator[Remedy]:
    for arguments, plan in _changes(found):
        try:
            then = estimate_plan(plan)
        except ValueError:  # settings that exclude each other
            continue
        yield Remedy(arguments, found.total - then.total, then)


def _changes(found: Estimate) -> Iterator[tuple[str, Plan]]:
    """Changes that are open to a plan, from those that leave the result as it is to those that train something else."""
    plan = found.plan
    if not plan.module.gradient_checkpointing:
        yield f"{MODEL}gradient_checkpointing true", plan.altered(gradient_checkpointing=True)
    for records in records_of(plan):
        times = plan.accumulate * plan.records // records
        cut = f" (pools of at most {records})" if records < plan.pool else ""
        arguments = f"--data.init_args.records_per_batch {records} --trainer.accumulate_grad_batches {times}{cut}"
        yield arguments, plan.altered(records=records, pool=min(plan.pool, records), accumulate=times)
    if not plan.card.cpu:
        yield from _shared_out(plan)
    yield from plan.family.changes(found)


def _shared_out(plan: Plan) -> Iterator[tuple[str, Plan]]:
    stage, offloads = plan.sharding.stage, plan.sharding.offload_optimizer
    files = ["zero2.yaml"] if stage is None and plan.gpus > 1 else []
    files += ["zero3.yaml"] if stage != 3 and plan.gpus > 1 else []
    files += [] if offloads else ["zero3_offload.yaml" if stage == 3 else "zero2_offload.yaml"]
    for file in files:
        yield f"--config {file}", plan.altered(sharding=shipped(file))


def shipped(file: str) -> Sharding:
    """What one of the configs for ZeRO sets."""
    with open(find_config(file), encoding="utf-8") as read:
        return sharding_of(Zero(**yaml.safe_load(read)["trainer"]["strategy"]["init_args"]))
