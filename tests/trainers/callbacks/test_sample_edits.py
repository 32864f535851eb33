"""Sample edits at each validation."""

from datamodules.records import EditRecord, EditRequest, Query
from modules.training_free.icl import Unedited
from trainers.callbacks import sample_edits


def test_samples_show_the_original_before_and_the_edited_model_after(run):
    events = run.events.Tensors("samples/edits/text_summary")
    assert [e.step for e in events] == [1, 2]
    lines = events[-1].tensor_proto.string_val[0].decode().split("\n")
    records = run.trainer.datamodule.validation_records()[:2]
    assert lines[0] == "| edit | asked | prompt | before | after | target |"
    samples = list(sample_edits.samples_of(records))
    assert [s.kind for s in samples][:3] == ["request", "rephrase", "neighbour"]
    prompts = [s.query.prompt for s in samples]
    with run.module.original() as backbone, Unedited().edit(backbone, []) as original:
        before = original.generate(prompts, 3)
    with run.module.editor().edit(backbone, [r.request for r in records]) as edited:
        after = edited.generate(prompts, 3)
    assert "\n".join(lines) == sample_edits.table(samples, before, after)


def test_samples_are_one_row_each_whatever_is_in_them():
    record = EditRecord("1", (EditRequest("a | b is", "c\nd"),), (Query("*b*", ("`c`",)),))
    rows = sample_edits.table(list(sample_edits.samples_of([record])), ["x|y", ""], ["", "<b>"]).split("\n")
    assert len(rows) == 4
    assert rows[2] == r"| a \| b is c d. | request | a \| b is | x\|y |  | c d |"
    assert rows[3].split(" | ")[2:] == [r"\*b\*", "", r"\<b\>", r"\`c\` |"]
