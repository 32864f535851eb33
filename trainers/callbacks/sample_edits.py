"""A few edits in words: what the model says before and after."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning as L

from datamodules.records import EditRecord, Query
from modules.evaluation import without_collisions
from modules.training_free.icl import Unedited
from trainers.callbacks.common import trained_editor, untouched, validation_records, writers
from trainers.markdown import markdown_table


class Sample(NamedTuple):
    """One row of the table."""

    edit: str
    kind: str
    query: Query


class SampleEdits(L.Callback):
    """After each validation, edits the first `count` validation records together and logs a table, samples/edits.

    Of each edit its own prompt, a rephrase and a neighbour; what the model answers before and after the edits; and the
    target (for a neighbour its true answer, and there "after" should equal "before").

    Answers are generated greedily, by all ranks alike (sharded weights want every rank in every forward pass).

    Args:
        count: edits.
        max_new_tokens: length of an answer.
    """

    def __init__(self, count: int = 5, max_new_tokens: int = 8) -> None:
        if count < 1 or max_new_tokens < 1:
            raise ValueError(f"count and max_new_tokens must be at least 1, got {count}, {max_new_tokens}")
        self.count, self.max_new_tokens = count, max_new_tokens
        self._before: list[str] = []  # the original model never changes: it is asked once

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        module = trained_editor(pl_module)
        records = validation_records(trainer, self.count)
        samples = list(samples_of(records))
        prompts = [s.query.prompt for s in samples]
        with untouched(pl_module):
            with module.original() as backbone, Unedited().edit(backbone, []) as original:
                self._before = self._before or original.generate(prompts, self.max_new_tokens)
            with module.editor().edit(backbone, [q for r in records for q in r.requests]) as edited:
                after = edited.generate(prompts, self.max_new_tokens)
        for file in writers(trainer):
            file.add_text("samples/edits", table(samples, self._before, after), trainer.global_step)


def samples_of(records: Sequence[EditRecord]) -> Iterator[Sample]:
    """Of each record its own prompt, a rephrase, and a neighbour that names no other edit's subject, as it has."""
    for record in without_collisions(records)[0]:
        request = record.request
        neighbours = [q for qs in record.locality.values() for q in qs]
        own = [Query(request.prompt, (request.target,))] if request.target else []
        for kind, queries in (("request", own), ("rephrase", record.rephrases), ("neighbour", neighbours)):
            yield from (Sample(request.statement, kind, q) for q in [q for q in queries if q.prompt][:1])


def table(samples: Sequence[Sample], before: Sequence[str], after: Sequence[str]) -> str:
    """A Markdown table of the samples with their answers."""
    heads = ["edit", "asked", "prompt", "before", "after", "target"]
    rows = [
        [_cell(text) for text in (s.edit, s.kind, s.query.prompt, old, new, s.query.target)]
        for s, old, new in zip(samples, before, after, strict=True)
    ]
    return markdown_table(heads, rows, texts=len(heads))


def _cell(text: str) -> str:
    """The text in one line, with nothing in it that Markdown would take for markup."""
    line = " ".join(text.split())
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>#|~" else c for c in line)
