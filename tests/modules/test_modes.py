"""Consecutive editing by an editor whose answers are written down, and the norms of an editor that changes weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from deltas import Nudge

from datamodules.records import EditRecord, EditRequest, Query
from modules.backbone import Backbone
from modules.editor import Edited, Editor, TargetScore
from modules.evaluation import Answers, TokenAccuracy, evaluate
from modules.fingerprint import weights_hash, weights_sum
from modules.interventions import merge
from modules.modes import consecutive, norms, stops_of, work
from modules.training_free.icl import InContext, RightEdit, Unedited

BACKBONE = cast(Backbone, SimpleNamespace(device=torch.device("cpu")))


class Scripted(Edited):
    """Answers what it was told, a token a letter, and '?' where it was told nothing."""

    def __init__(self, says: dict[str, str]) -> None:
        self.says, self.context = says, ""

    def score(self, prompts: Sequence[str], targets: Sequence[str], batch_size: int = 32) -> list[TargetScore]:
        said = [self.says.get(p, "").ljust(len(t), "?")[: len(t)] for p, t in zip(prompts, targets, strict=True)]
        ids = [[torch.tensor([ord(c) for c in text]) for text in pair] for pair in zip(said, targets, strict=True)]
        return [TargetScore(torch.zeros(len(target)), predicted, target) for predicted, target in ids]


class Forgetful(Editor):
    """Knows the last `memory` edits; each further one spoils one more neighbour of the first."""

    name = "forgetful"

    def __init__(self, memory: int = 3) -> None:
        self.memory = memory
        self.batches: list[int] = []
        self.open = 0

    @contextmanager
    def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator["Told"]:
        with Told(self, []).edit(requests) as told:
            yield told


class Told(Scripted):
    def __init__(self, editor: Forgetful, requests: list[EditRequest]) -> None:
        known = {r.prompt: r.target for r in requests[-editor.memory :]}
        super().__init__(known | {f"neighbour {i}": "spoilt" for i in range(len(requests) - 1)})
        self.editor, self.requests = editor, requests

    @contextmanager
    def edit(self, requests: Sequence[EditRequest]) -> Iterator["Told"]:
        self.editor.batches.append(len(requests))
        self.editor.open += 1
        try:
            yield Told(self.editor, [*self.requests, *requests])
        finally:
            self.editor.open -= 1


def made(count: int) -> list[EditRecord]:
    return [
        EditRecord(
            str(i), (EditRequest(f"prompt {i}", "Peru"),), locality={"near": (Query(f"neighbour {i}", ("Oslo",)),)}
        )
        for i in range(count)
    ]


def values(checkpoints: Sequence[Any], metric: str) -> list[float]:
    return [c.evaluation.aggregates[metric]["value"] for c in checkpoints]


def test_sequential_editing_is_evaluated_over_all_edits_so_far() -> None:
    editor, seen, told = Forgetful(), [], []
    found = consecutive(
        editor,
        BACKBONE,
        made(8),
        checkpoints=[1, 2, 4],
        judge=TokenAccuracy(Answers(Scripted({}))),
        progress=told.append,
        at_checkpoint=seen.append,
    )
    assert editor.batches == [1] * 8
    assert editor.open == 0
    assert seen == found
    assert [c.evaluation.pool_size for c in found] == [1, 2, 4, 8]
    # of n edits the last 3 are known; of n neighbours the first n - 1 are spoilt
    assert values(found, "reliability/token_accuracy") == [1, 1, 3 / 4, 3 / 8]
    assert values(found, "locality/token_agreement") == [1, 1 / 2, 1 / 4, 1 / 8]
    assert [c.first["reliability/token_accuracy"]["value"] for c in found] == [1, 1, 0, 0]
    assert [c.first["locality/token_agreement"]["value"] for c in found] == [1, 0, 0, 0]
    assert [len(c.evaluation.records) for c in found] == [1, 2, 4, 8]
    assert sum(told) == work(8, 1, [1, 2, 4]) == 8 + 1 + 2 + 4 + 8
    assert [c.norms for c in found] == [{}] * 4
    seconds = [c.evaluation.edit_seconds for c in found]
    assert seconds == sorted(seconds)
    assert found[-1].evaluation.settings["batch"] == 1


def test_consecutive_batches() -> None:
    editor = Forgetful(memory=4)
    found = consecutive(editor, BACKBONE, made(8), 3, [1, 4], judge=TokenAccuracy(Answers(Scripted({}))))
    assert editor.batches == [3, 3, 2]
    assert [c.evaluation.pool_size for c in found] == [3, 6, 8]  # at the ends of their batches
    assert values(found, "reliability/token_accuracy") == [1, 4 / 6, 4 / 8]
    # the first checkpoint's records are 0 to 2: of six edits 2 to 5 are known, of eight 4 to 7
    assert [c.first["reliability/token_accuracy"]["value"] for c in found] == [1, pytest.approx(1 / 3), 0]


def test_batch_of_all_is_the_evaluation_of_one_pool() -> None:
    (last,) = consecutive(Forgetful(), BACKBONE, made(5), 5, [5], judge=TokenAccuracy(Answers(Scripted({}))))
    pool = evaluate(Forgetful(), BACKBONE, made(5), 5, originals=Answers(Scripted({})))
    assert last.evaluation.records == pool.records
    assert last.evaluation.aggregates == pool.aggregates


def test_every_checkpoint_asks_the_same_of_a_record() -> None:
    about_last = Query("Is Lima near Lyon?", ("no",))
    first = EditRecord("a", (EditRequest("Lyon is in", "Peru", "Lyon"),), locality={"near": (about_last,)})
    last = EditRecord("b", (EditRequest("Lima is in", "Chad", "Lima"),))
    found = consecutive(
        Forgetful(), BACKBONE, [first, last], checkpoints=[1], judge=TokenAccuracy(Answers(Scripted({})))
    )
    assert [c.evaluation.records[0]["left_out"] for c in found] == [1, 1]
    assert all("locality/token_agreement" not in c.evaluation.aggregates for c in found)
    assert found[-1].evaluation.settings["queries_left_out"] == 1


def test_conflicting_edits_are_counted_among_those_so_far() -> None:
    records = [EditRecord(c, (EditRequest("Lyon is in", land, "Lyon"),)) for c, land in zip("abc", "PPQ", strict=True)]
    found = consecutive(Forgetful(), BACKBONE, records, checkpoints=[2], judge=TokenAccuracy(Answers(Scripted({}))))
    assert [c.evaluation.settings["conflicting_edits"] for c in found] == [0, 3]


def test_stops() -> None:
    assert stops_of(250, 1) == [1, 10, 100, 250]
    assert stops_of(250, 10) == [10, 100, 250]
    assert stops_of(25, 10, [1, 15, 900]) == [10, 20, 25]
    assert stops_of(4, 1, []) == [4]
    for bad in ((0, 1, None), (4, 0, None), (4, 1, [0])):
        with pytest.raises(ValueError, match="at least 1"):
            stops_of(*bad)


def test_what_cannot_edit_further_says_so_and_leaves_nothing_open() -> None:
    class Once(Forgetful):
        name = "once"

        @contextmanager
        def edit(self, backbone: Backbone, requests: Sequence[EditRequest]) -> Iterator[Any]:
            self.open += 1
            try:
                yield Scripted({r.prompt: r.target for r in requests})
            finally:
                self.open -= 1

    editor = Once()
    with pytest.raises(NotImplementedError, match="Scripted cannot take further edits"):
        consecutive(editor, BACKBONE, made(2), judge=TokenAccuracy(Answers(Scripted({}))))
    assert editor.open == 0
    with pytest.raises(ValueError, match="icl_right_edit has only each record's own edit"):
        consecutive(RightEdit(), BACKBONE, made(2))


def test_in_context_learning_tells_all_edits_again(tiny: Any, records: list[EditRecord]) -> None:
    backbone = tiny()
    both = consecutive(InContext(), backbone, records, 2, [4])[-1]
    assert both.evaluation.records == evaluate(InContext(), backbone, records, 4).records
    unedited = consecutive(Unedited(), backbone, records, checkpoints=[4])[-1]
    assert unedited.evaluation.aggregates["locality/token_agreement"]["value"] == 1


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_norms_are_those_of_the_merged_matrix(tiny: Any, records: list[EditRecord], kind: str) -> None:
    backbone = tiny(kind)
    torch.manual_seed(0)
    found = consecutive(Nudge([1, 2]), backbone, records, 2, [2])
    name = f"{backbone.parts.layers}.1.{backbone.parts.down}"
    before = backbone.model.get_submodule(name).weight.clone()
    assert [len(c.norms) for c in found] == [2, 2]
    torch.manual_seed(0)
    with Nudge([1, 2]).edit(backbone, [r.request for r in records[:2]]) as edited:
        terms = edited.weight_changes()
    dense = {n: term.weight()[0] for n, term in terms.items()}
    assert norms(backbone, terms)[name] == pytest.approx(norms(backbone, dense)[name])
    merge(backbone.model, terms)
    after = backbone.model.get_submodule(name).weight
    wanted = [float(m.abs().sum()) for m in (before, after, after - before)]
    assert list(found[0].norms[name]) == pytest.approx(wanted, rel=1e-5)
    assert found[1].norms[name].change > found[0].norms[name].change


def test_fingerprints_see_every_change(tiny: Any) -> None:
    model = tiny().model
    whole, summed = weights_hash(model), weights_sum(model)
    assert (weights_hash(tiny().model), weights_sum(tiny().model)) == (whole, summed)
    weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    with torch.no_grad():
        kept = weight[0, 0].item()
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        assert weights_hash(model) != whole
        assert weights_sum(model) != summed
        weight[0, 0] = kept
    assert (weights_hash(model), weights_sum(model)) == (whole, summed)
    assert weights_hash(model.bfloat16()) != whole
    assert isinstance(weights_sum(model), int)
