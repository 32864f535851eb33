"""What every protocol shares: records are edited together, and a judge puts their questions to the edited model.

A protocol is a `Judge`. How records are edited is not its affair: pools of them, each from the unedited model
(`evaluate_pools`), or batch after batch on top of one another (modules/modes.py).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from typing import Any

from datamodules.records import EditRecord, EditRequest
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.meter import Meter, now

Make = Callable[[Sequence[EditRequest]], AbstractContextManager[Edited]]


@dataclass(frozen=True)
class Case:
    """A record as it is asked among those that it is edited with.

    Args:
        record: without the questions that the others' edits leave without a right answer.
        left_out: how many questions those are.
        contradicted: whether another's edit contradicts what the record's multi-hop questions rest on (see
            `datamodules.readers.mquake.conflicting`), so that these are not asked.
        asked: whether it is asked anything at all; it is edited in any case.
    """

    record: EditRecord
    left_out: int = 0
    contradicted: bool = False
    asked: bool = True


def thinned(records: Sequence[EditRecord], kept: Sequence[EditRecord], left_out: Sequence[int]) -> list[Case]:
    """Cases of records some of whose questions are not asked; see `modules.evaluation.without_collisions`."""
    return [
        Case(after, count, contradicted=bool(before.multi_hop) and not after.multi_hop)
        for before, after, count in zip(records, kept, left_out, strict=True)
    ]


@dataclass(frozen=True)
class Evaluation:
    """One editor at one pool size.

    Attributes:
        records: per-record results; their shape is the protocol's.
        aggregates: metric -> {value, ci, records}, see `modules.metrics.summarise`.
        edit_seconds: spent on making the edits, over all pools.
        edit_bytes: the most memory that making the edits of one pool took above what was held before, see
            `modules.meter.Meter`.
        answer_seconds: spent on the edited model's answers, over all pools.
        settings: the protocol, how it was measured, how many records were `edited` by how many `requests`, how many
            records and queries were left out, and how many records' edits conflict with another's
            (`conflicting_edits`). Where it was counted, `queries` is how many different
            prompts were asked, and `context_tokens` the mean number of tokens that the method put before one.
    """

    editor: str
    pool_size: int
    records: list[dict[str, Any]]
    aggregates: dict[str, dict[str, Any]]
    edit_seconds: float
    edit_bytes: int
    answer_seconds: float
    settings: dict[str, Any]


class Judge(ABC):
    """A protocol: what is asked of an edited model, and how its answers are judged.

    Attributes:
        name: what `--protocol` and a result say.
        definitions: metric name -> how it is measured.
    """

    name: str
    definitions: Mapping[str, str]

    def check(self, records: Iterable[EditRecord]) -> None:  # noqa: B027  most protocols judge any record
        """Refuse records that the protocol cannot judge.

        Raises:
            ValueError: names the first one, and what it lacks.
        """

    def cases(self, records: Sequence[EditRecord]) -> list[Case]:
        """Records that are edited together, one case each."""
        return [Case(record) for record in records]

    def ask_unedited(self, cases: Sequence[Case]) -> None:  # noqa: B027  not all compare with the unedited model
        """Ask the unedited model what it is needed for; called before the edit, which may live in the same modules."""

    @abstractmethod
    def ask(self, edited: Edited, cases: Sequence[Case]) -> list[Any]:
        """Put the cases' questions to a model under the edits of all of them (and maybe of others); one value each."""

    def results(self, found: list[Any], make: Make) -> list[dict[str, Any]]:
        """Per-record results: `case_id`, `requested_rewrite`, `post` and what else the protocol has.

        Args:
            found: what `ask` gave.
            make: makes the edits of these cases anew, with further ones in the same call; no edit is in place now.
        """
        return found

    @abstractmethod
    def values(self, post: Mapping[str, Any]) -> dict[str, float]:
        """Metric name -> value of one record, from the `post` of its result."""

    @abstractmethod
    def summary(self, results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, dict[str, Any]]:
        """See `modules.metrics.summarise`; empty without results."""

    def prompts(self, cases: Sequence[Case]) -> list[str]:
        """The different prompts that the cases ask; empty where they are not counted."""
        return []

    def options(self) -> dict[str, Any]:
        """How it asks, as JSON values."""
        return {}

    def counts(self, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What else is counted in results, as JSON values."""
        return {}


def evaluate_pools(
    judge: Judge,
    editor: Editor,
    backbone: Backbone,
    records: Sequence[EditRecord],
    pool_size: int,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
    look: Callable[[Edited, Sequence[EditRecord]], None] | None = None,
    asked: int | None = None,
) -> Evaluation:
    """Edit the records a pool at a time, each pool from the unedited backbone, and judge.

    With more records than `pool_size`, those that do not fill a last pool are dropped, and counted, so that every
    figure is of one pool size. With fewer, all records are one pool, and the result carries its true size.

    An editor with `own_edit_only` is given each record's own edits and no others; its questions are still those that
    the whole pool leaves, so that the figures can be compared.

    Args:
        pool_size: in records (a record of MQuAKE holds several edits).
        seed: of the bootstrap.
        progress: called with the number of records done since the last call.
        look: called with each edited model, and the records of it that are asked; its time does not count.
        asked: ask only the first so many records of each pool; all of them are edited. By default all are asked.

    Raises:
        ValueError: without records or with a pool size below 1, for records that the protocol cannot judge, where every
            one is contradicted; and whatever the editor raises.
    """
    pools, dropped = split_pools(records, pool_size)
    judge.check(records)
    judged = [first_asked(judge.cases(pool), asked) for pool in pools]
    refuse_unasked([case for cases in judged for case in cases])
    results: list[dict[str, Any]] = []
    editing, answer_seconds = Meter(backbone), 0.0
    queries = context_tokens = 0
    for cases in judged:
        judge.ask_unedited([case for case in cases if case.asked])
        for group in [[case] for case in cases] if editor.own_edit_only else [cases]:
            requests = [request for case in group for request in case.record.requests]
            if those := [case for case in group if case.asked]:
                prompts = judge.prompts(those)
                with ExitStack() as stack:
                    with editing.running():
                        edited = stack.enter_context(editor.edit(backbone, requests))
                    ready = now(backbone)
                    found = judge.ask(edited, those)
                    answer_seconds += now(backbone) - ready
                    queries += len(prompts)
                    context_tokens += sum(edited.context_tokens(prompts)) if prompts else 0
                    if look:
                        look(edited, [case.record for case in those])
                left = now(backbone)
                results += judge.results(found, _maker(editor, backbone, requests))
                answer_seconds += now(backbone) - left
            if progress:
                progress(len(group))
    settings = settings_of(judge, [case for cases in judged for case in cases], results, seed) | {
        "own_edit_only": editor.own_edit_only,
        "pools": len(pools),
        "records_dropped": dropped,
        "conflicting_edits": sum(map(conflicting_edits, pools)),
    }
    if asked:
        settings["asked_of_each_pool"] = asked
    if editor.own_edit_only:  # what is not asked is not edited either
        alone = [case for cases in judged for case in cases if case.asked]
        settings |= {"edited": len(alone), "requests": _requests(alone)}
    if queries:
        settings |= {"queries": queries, "context_tokens": context_tokens / queries}
    aggregates = judge.summary(results, seed)
    return Evaluation(
        editor.name, len(pools[0]), results, aggregates, editing.seconds, editing.peak, answer_seconds, settings
    )


def first_asked(cases: Sequence[Case], count: int | None) -> list[Case]:
    """Cases of which only the first `count` that can be asked are; all of them without a count."""
    left = len(cases) if count is None else count
    found = []
    for case in cases:
        found.append(case if left > 0 else replace(case, asked=False))
        left -= case.asked
    return found


def settings_of(judge: Judge, cases: Sequence[Case], results: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """What a result says of how it was measured."""
    return (
        {"protocol": judge.name}
        | judge.options()
        | {
            "records": len(results),
            "edited": len(cases),
            "requests": _requests(cases),
            "queries_left_out": sum(case.left_out for case in cases),
            "records_contradicted": sum(case.contradicted for case in cases),
            "bootstrap_seed": seed,
        }
        | judge.counts(results)
    )


def _requests(cases: Iterable[Case]) -> int:
    return sum(len(case.record.requests) for case in cases)


def conflicting_edits(records: Sequence[EditRecord]) -> int:
    """How many of the records edit a prompt that another one edits to something else; at most one of these can hold.

    All of them are edited and asked all the same, as in the publications.
    """
    targets: dict[str, set[str]] = {}
    for prompt, target in (edit for record in records for edit in _edits(record)):
        targets.setdefault(prompt, set()).add(target)
    return sum(any(len(targets[prompt]) > 1 for prompt, _ in _edits(record)) for record in records)


def _edits(record: EditRecord) -> list[tuple[str, str]]:
    """Prompts and targets; what is edited by free text has none."""
    return [(request.prompt.strip(), request.target.strip()) for request in record.requests if request.target]


def refuse_unasked(cases: Sequence[Case]) -> None:
    """Refuse cases none of which can be asked, before any work."""
    if not any(case.asked for case in cases):
        raise ValueError(
            "every case is contradicted by another one of its pool, so none has a right answer: take smaller pools, or "
            "read the data with options: {conflicts: false}"
        )


def split_pools(records: Sequence[EditRecord], size: int) -> tuple[list[Sequence[EditRecord]], int]:
    """Full pools of `size` records, and how many records are dropped; all records as one pool where they are fewer.

    Raises:
        ValueError: without records, or for a size below 1.
    """
    if not records or size < 1:
        raise ValueError(f"needs records and a pool size of at least 1, got {len(records)} records, pool size {size}")
    if len(records) <= size:
        return [records], 0
    whole = len(records) // size * size
    return [records[at : at + size] for at in range(0, whole, size)], len(records) - whole


def rewrite(record: EditRecord) -> dict[str, Any] | list[dict[str, Any]]:
    """A record's edits as EasyEdit's results name them; a list where there are several."""
    rewrites = [
        {
            "prompt": request.prompt,
            "target_new": request.target,
            "ground_truth": request.old_target,
            "subject": request.subject,
            "text": request.text,
        }
        for request in record.requests
    ]
    return rewrites[0] if len(rewrites) == 1 else rewrites


def _maker(editor: Editor, backbone: Backbone, requests: Sequence[EditRequest]) -> Make:
    return lambda further: editor.edit(backbone, [*requests, *further])
