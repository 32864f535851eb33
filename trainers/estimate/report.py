"""An estimate as tables."""

from rich.console import Console
from rich.table import Table

from trainers.estimate.cards import GIB
from trainers.estimate.totals import UTILISATION, Estimate


def show(found: Estimate, console: Console | None = None) -> None:
    """Print parameters by part, memory by component and moment, the host's memory, speed, and the verdict."""
    console = console or Console()
    console.print(_parameters(found), _memory(found))
    for line in [*_host(found), _speed(found), _verdict(found)]:
        console.print(line, highlight=False)


def _parameters(found: Estimate) -> Table:
    table = Table("part", title="Parameters", title_justify="left")
    for column in ("parameters", "trained"):
        table.add_column(column, justify="right")
    for name, part in found.counts.parts.items():
        table.add_row(name, f"{part.all:,}", f"{part.trained:,}")
    table.add_section()
    table.add_row("all", f"{sum(found.counts.sizes):,}", f"{found.counts.trained:,}")
    if found.counts.frozen:
        table.add_row(f"{found.counts.frozen_name}, beside it", f"{found.counts.frozen:,}", "0")
    return table


def _memory(found: Estimate) -> Table:
    plan = found.plan
    where = "process" if plan.card.cpu else "GPU"
    limits, queries = plan.module.queries, plan.family.queries(plan.module)
    names = [name for name in ("max_edit_tokens", "max_query_tokens") if hasattr(limits, name)]
    allowed = " and ".join(f"{name} {getattr(limits, name)}" for name in names)
    largest = f"{plan.records} edits and {plan.records * queries} queries, the longest that queries.{allowed} allow"
    table = Table("GiB", title=f"Memory of one {where} of {plan.gpus}; a micro-batch: {largest}", title_justify="left")
    for moment in found.moments:
        table.add_column(moment, justify="right")
    fullest_first = sorted(found.moments.values(), key=len, reverse=True)
    for name in dict.fromkeys(name for parts in fullest_first for name, size in parts.items() if size):
        table.add_row(name, *(_gib(parts.get(name, 0)) for parts in found.moments.values()))
    table.add_section()
    table.add_row("all", *(_gib(sum(parts.values())) for parts in found.moments.values()))
    return table


def _host(found: Estimate) -> list[str]:
    if not found.host:
        return []
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in found.host.items() if size)
    return [f"Host memory of one machine: {sum(found.host.values()) / GIB:.1f} GiB ({parts})"]


def _speed(found: Estimate) -> str:
    work = f"{found.flops / 1e9:.1f} GFLOP a token"
    if found.tokens_per_second is None:
        return f"Speed: not estimated, which needs a card with a name, 16-bit precision and no offload; {work}"
    each = found.tokens_per_second / found.plan.gpus
    hours = f"; {found.hours:.1f} h for {found.plan.steps:,} steps of {found.tokens:,} tokens" if found.hours else ""
    return (
        f"Speed: {found.tokens_per_second:,.0f} tokens/s, {each:,.0f} a GPU{hours}; {work}. Assumed, not measured: "
        f"{UTILISATION:.0%} of the card's peak in bf16 and in fp32, texts of the longest, no padding, no waiting for "
        "data or other GPUs"
    )


def _verdict(found: Estimate) -> str:
    fits = "fits" if found.fits else "does not fit"
    return (
        f"[bold]{fits}[/]: {found.total / GIB:.1f} GiB of {found.capacity / GIB:.1f} GiB of one "
        f"{found.plan.card.name}, at most in: {found.moment}"
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size else "-"
