"""One cell of a benchmark: edit, evaluate, and keep what a reader of the results wants to see."""

from collections.abc import Callable, Sequence
from typing import Any

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.editor import Edited, Editor
from modules.evaluation import Answers, questions
from modules.judging import Evaluation, evaluate_pools
from modules.modes import consecutive
from trainers.benchmark.grid import Cell

Progress = Callable[[int], None]
NEW_TOKENS = 16  # of an answer that is kept for reading


def run_cell(
    cell: Cell,
    editor: Editor,
    backbone: Backbone,
    originals: Answers,
    shown: int,
    tell: Progress,
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """The result of a cell as JSON values.

    Args:
        originals: the unedited model's answers, which other cells have use of too.
        shown: of so many records, generated answers are kept.
        tell: called with the number of records done since the last call.
        keep: called with the result so far at each number of edits that is reached: hours may lie between two.

    Returns:
        `points`: an entry for each number of edits, with `edits`, `metrics` (as modules.metrics.summarise),
        `edit_seconds`, `edit_bytes`, `answer_seconds`, `norms`, `records` (in EasyEdit's shape); `answers`: see
        `_read`.
    """
    judge, seed = cell.judging.judge(originals, cell.batch_size), cell.about["seed"]
    points: list[dict[str, Any]] = []
    before: dict[Any, str] = {}
    after: dict[Any, str] = {}
    _read(Edited(backbone), cell.records[:shown], before)

    def reached(evaluation: Evaluation, edits: int, norms: dict[str, Any]) -> None:
        points.append(_point(evaluation, edits, norms))
        keep(_so_far(points, before, after))

    if cell.mode in ("sequential", "consecutive"):
        consecutive(
            editor,
            backbone,
            cell.records,
            cell.batch,
            cell.edits,
            judge,
            seed,
            progress=tell,
            at_checkpoint=lambda at: reached(
                at.evaluation, at.evaluation.pool_size, {name: n._asdict() for name, n in at.norms.items()}
            ),
            at_end=lambda edited: _read(edited, cell.records[:shown], after),
        )
    else:
        wanted = {record.id for record in cell.records[:shown]}
        evaluation = evaluate_pools(
            judge,
            editor,
            backbone,
            cell.records,
            1 if cell.mode == "single" else len(cell.records),
            seed,
            progress=tell,
            look=lambda edited, records: _read(edited, [r for r in records if r.id in wanted], after),
            asked=cell.asked,
        )
        reached(evaluation, len(cell.records) if cell.mode == "batch" else 1, {})
    return _so_far(points, before, after)


def in_words(error: Exception) -> dict[str, str]:
    """A failure as a result tells it."""
    return {"error": f"{type(error).__name__}: {error}"}


def _so_far(points: list[dict[str, Any]], before: dict[Any, str], after: dict[Any, str]) -> dict[str, Any]:
    answers = [
        {"record": record, "kind": kind, "prompt": prompt, "gold": gold, "before": text, "after": after[at]}
        for at, text in before.items()
        if at in after  # else it was not asked: another record of its pool would have made it ambiguous
        for record, kind, prompt, gold in [at]
    ]
    return {"points": points, "answers": answers}


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
