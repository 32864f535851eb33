"""One cell of a benchmark: edit, evaluate, and keep what a reader of the results wants to see."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, questions
from modules.judging import Evaluation, Judge, evaluate_pools
from modules.modes import Checkpoint, consecutive
from trainers.benchmark.grid import Cell

log = logging.getLogger(__name__)
Progress = Callable[[int], None]
NEW_TOKENS = 16  # of an answer that is kept for reading


def run_cell(
    cell: Cell,
    editor: Editor,
    backbone: Backbone,
    originals: Answers,
    shown: int,
    tell: Progress,
) -> dict[str, Any]:
    """The result of a cell as JSON values.

    Args:
        originals: the unedited model's answers, which other cells have use of too.
        shown: of so many records, generated answers are kept.
        tell: called with the number of records done since the last call.

    Returns:
        `points`: an entry for each number of edits, with `edits`, `metrics` (as modules.metrics.summarise),
        `edit_seconds`, `answer_seconds`, `norms`, `records` (in EasyEdit's shape); `answers`: see `_read`; `memory` in
        bytes: before and at the peak; `error`, where a run of several numbers of edits failed after the first of them.
    """
    judge, seed = cell.judging.judge(originals, cell.about["batch_size"]), cell.about["seed"]
    _read(Edited(backbone), cell.records[:shown], before := {})
    failed: dict[str, str] = {}
    if cell.mode in ("sequential", "consecutive"):
        points, after = _consecutive(cell, editor, backbone, judge, seed, shown, tell, failed)
    else:
        points, after = _at_once(cell, editor, backbone, judge, seed, shown, tell)
    answers = [
        {"record": record, "kind": kind, "prompt": prompt, "gold": gold, "before": text, "after": after[at]}
        for at, text in before.items()
        if at in after  # else it was not asked: another record of its pool would have made it ambiguous
        for record, kind, prompt, gold in [at]
    ]
    return {"points": points, "answers": answers} | failed


def in_words(error: Exception) -> dict[str, str]:
    """A failure as a result tells it."""
    return {"error": f"{type(error).__name__}: {error}"}


def _at_once(
    cell: Cell,
    editor: Editor,
    backbone: Backbone,
    judge: Judge,
    seed: int,
    shown: int,
    tell: Progress,
) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    after: dict[Any, str] = {}
    wanted = {record.id for record in cell.records[:shown]}

    def look(edited: Edited, records: Sequence[EditRecord]) -> None:
        _read(edited, [r for r in records if r.id in wanted], after)

    size = 1 if cell.mode == "single" else len(cell.records)
    evaluation = evaluate_pools(
        judge, editor, backbone, cell.records, size, seed, progress=tell, look=look, asked=cell.asked
    )
    return [_point(evaluation, len(cell.records) if cell.mode == "batch" else 1, {})], after


def _consecutive(
    cell: Cell,
    editor: Editor,
    backbone: Backbone,
    judge: Judge,
    seed: int,
    shown: int,
    tell: Progress,
    failed: dict[str, str],
) -> tuple[list[dict[str, Any]], dict[Any, str]]:
    """Points and answers; after a failure the points until then, and the failure in `failed`."""
    points: list[dict[str, Any]] = []
    after: dict[Any, str] = {}

    def at(reached: Checkpoint) -> None:
        norms = {name: n._asdict() for name, n in reached.norms.items()}
        points.append(_point(reached.evaluation, reached.evaluation.pool_size, norms))

    try:
        consecutive(
            editor,
            backbone,
            cell.records,
            cell.batch,
            cell.edits,
            judge,
            seed,
            progress=tell,
            at_checkpoint=at,
            at_end=lambda edited: _read(edited, cell.records[:shown], after),
        )
    except Exception as error:  # the numbers of edits that were reached may have taken hours
        if not points:
            raise
        log.debug("%s failed after %d edits", cell.name, points[-1]["edits"], exc_info=True)
        failed |= in_words(error)
    return points, after


def _point(evaluation: Evaluation, edits: int, norms: dict[str, Any]) -> dict[str, Any]:
    return {
        "edits": edits,
        "metrics": evaluation.aggregates,
        "edit_seconds": evaluation.edit_seconds,
        "edit_bytes": evaluation.edit_bytes,
        "answer_seconds": evaluation.answer_seconds,
        "edited": evaluation.settings["edited"],
        "requests": evaluation.settings["requests"],
        "settings": evaluation.settings,
        "norms": norms,
        "records": evaluation.records,
    }


def _read(edited: Edited, records: Sequence[EditRecord], to: dict[Any, str]) -> None:
    """Generated answers to the first question of every sort, by (record id, sort, prompt, gold answer)."""
    asked = [
        (record.id, sort, queries[0].prompt, queries[0].target)
        for record in records
        for sort, queries in questions(record).items()
        if queries and queries[0].prompt
    ]
    if asked:
        to |= zip(asked, edited.generate([prompt for _, _, prompt, _ in asked], NEW_TOKENS), strict=True)
