"""Asking models: choosing among options, what fits the window, results, and changes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from deltas import Nudge

from datamodules.records import EditRecord
from datamodules.tokens import encode
from modules.ability.choice import Choice, choose
from modules.ability.measure import change, measure
from modules.ability.states import edited_models
from modules.ability.task import Example, drawn
from modules.backbone import Backbone
from modules.editor import Edited
from modules.fingerprint import weights_hash
from modules.training_free.icl import InContext, RightEdit


@dataclass
class Made(Choice):
    """A task made of given examples."""

    path: str = ""
    made: Sequence[Example] = ()

    name: ClassVar[str] = "made"
    main: ClassVar[str] = "made/accuracy"

    def examples(self) -> list[Example]:
        return list(self.made)


def test_choosing_in_one_pass_or_many(tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.ability.choice.AT_ONCE", 3)
    edited = Edited(tiny())
    prompts = [f"Question {i} is" for i in range(7)]
    single, longer = ("A", "B", "C"), ("A", "True enough", "Bee")  # of bytes
    calls: list[int] = []
    plain = edited.score

    def score(prompts: Any, targets: Any, *options: Any, **more: Any) -> Any:
        calls.append(len(prompts))
        return plain(prompts, targets, *options, **more)

    edited.score = score  # type: ignore[method-assign]

    def by_hand(prompt: str, options: Sequence[str]) -> int:
        sums = [float(s.log_probs.sum()) for s in plain([prompt] * len(options), list(options))]
        return sums.index(max(sums))

    for options in (single, longer):
        found = choose(edited, prompts, [options] * 7, batch_size=3)
        assert found == [by_hand(p, options) for p in prompts]
    assert len(set(choose(edited, prompts, [single] * 7))) > 1  # else a constant would pass
    mixed = choose(edited, prompts[:2], [single, longer], batch_size=3)
    assert mixed == [by_hand(prompts[0], single), by_hand(prompts[1], longer)]
    assert calls == [
        3,
        3,
        1,
        21,
        3,
        3,
        1,
        1,
        3,
    ]  # one pass each where options are single tokens, else one for each option


def test_examples_that_fit_are_drawn_by_seed(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny(max_position_embeddings=64)
    short = [Example(str(i), f"what is {i}?", ("A",), ("A", "B")) for i in range(20)]
    long = [Example(f"long {i}", "word " * 100, ("A",), ("A", "B")) for i in range(20)]
    task = Made(made=[*short, *long])
    found, passed_over = drawn(task, backbone, 10, seed=1)
    assert len(found) == 10
    assert not any(e.id.startswith("long") for e in found)
    assert passed_over > 0
    more, all_over = drawn(task, backbone, None, seed=1)
    assert more[:10] == found
    assert (len(more), all_over) == (20, 20)
    assert [e.id for e in drawn(task, backbone, 10, seed=2)[0]] != [e.id for e in found]
    with pytest.raises(ValueError, match="made: none of 20 examples fits"):
        drawn(Made(made=long), backbone)


def test_shots_that_do_not_fit_are_left_out_from_the_last(tiny: Callable[..., Backbone]) -> None:
    shots = ("one two three. ", "four five six. ", "seven eight nine. ")
    task = Made(made=[Example("0", "which?", ("A",), ("A", "B"), "Head. ", shots)])
    backbone = tiny()
    ((whole,), _) = drawn(task, backbone)
    assert whole.prompt == "Head. one two three. four five six. seven eight nine. which?"
    needed = len(encode(backbone.tokenizer, "Head. one two three. four five six. which?").ids)
    backbone.model.config.max_position_embeddings = needed + 5
    ((fewer,), passed_over) = drawn(task, backbone)
    assert fewer.prompt == "Head. one two three. four five six. which?"
    assert (fewer.head, fewer.shots, passed_over) == ("", (), 0)


def test_results_are_in_the_order_of_the_examples(
    tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.ability.measure.BATCHES", 1)
    edited, told = Edited(tiny()), []
    examples = [Example(str(i), "is it " + "so " * i + "?", ("A",), ("A", "B", "C", "D")) for i in (2, 0, 5, 1, 4)]
    found = measure(edited, Made(), examples, batch_size=2, progress=told.append)
    assert [e["id"] for e in found["examples"]] == ["2", "0", "5", "1", "4"]
    assert told == [1, 2, 2]  # alike together, the longest first
    chosen = choose(edited, [e.prompt for e in examples], [e.options for e in examples])
    assert [e["choice"] for e in found["examples"]] == ["ABCD"[i] for i in chosen]
    metric = found["metrics"]["made/accuracy"]
    assert metric["value"] == pytest.approx(sum(i == 0 for i in chosen) / 5)
    assert metric["ci"][0] <= metric["value"] <= metric["ci"][1]
    assert metric["records"] == 5
    with pytest.raises(ValueError, match="made: no examples"):
        measure(edited, Made(), [])


def test_a_change_is_paired() -> None:
    def result(values: Sequence[float | None], ids: str = "abcd") -> dict[str, Any]:
        return {"examples": [{"id": i, "values": {"m": v}} for i, v in zip(ids, values, strict=True)]}

    same = change(result([1, 0, 1, 0]), result([1, 0, 1, 0]))
    assert same["m"] == {"value": 0.0, "ci": [0.0, 0.0], "records": 4}  # the means' own intervals are wide
    worse = change(result([1, 1, 1, 0]), result([0, 0, 1, 0]))
    assert worse["m"]["value"] == -0.5
    assert worse["m"]["ci"][0] < -0.5 < worse["m"]["ci"][1] <= 0
    with pytest.raises(ValueError, match="same examples"):
        change(result([1, 0, 1, 1]), result([1, 0, 1, 1], "abce"))
    partly = change(
        {"examples": [{"id": "a", "values": {"m": 1.0, "n": 1.0}}]}, {"examples": [{"id": "a", "values": {"m": 0.0}}]}
    )
    assert set(partly) == {"m"}
    broken = change(result([1, None, 1, 0]), result([1, 0, 1, 0]))["m"]  # null in a file: no number, and no mean
    assert broken["value"] != broken["value"]


@pytest.mark.parametrize(("batch", "calls"), [(None, [1, 3]), (1, [1, 1, 1]), (2, [2, 1])])
def test_models_after_so_many_edits(
    batch: int | None, calls: list[int], tiny: Callable[..., Backbone], records: list[EditRecord]
) -> None:
    backbone = tiny()
    before = weights_hash(backbone.model)
    Nudge.calls.clear()
    torch.manual_seed(0)
    counts = [2, 3] if batch == 2 else [1, 3]
    sizes = []
    for count, edited, seconds in edited_models(Nudge(layers=[1]), backbone, records[:3], counts, batch):
        sizes.append((count, len(edited.requests)))  # type: ignore[attr-defined]
        assert seconds > 0
    assert Nudge.calls == calls
    assert sizes == [(c, c) for c in counts]
    assert weights_hash(backbone.model) == before


def test_edits_that_cannot_be_made_are_refused_before_any(
    tiny: Callable[..., Backbone], records: list[EditRecord]
) -> None:
    backbone = tiny()
    Nudge.calls.clear()

    def first(*args: Any) -> None:
        next(edited_models(*args))

    for counts in ([2, 1], [0, 1], [5], [1, 1]):
        with pytest.raises(ValueError, match="must ascend from 1 or more to 4"):
            first(Nudge(layers=[1]), backbone, records, counts)
    with pytest.raises(ValueError, match="after 3 edits no batch of 2 ends"):
        first(Nudge(layers=[1]), backbone, records, [3, 4], 2)
    with pytest.raises(ValueError, match="at least one record"):
        first(Nudge(layers=[1]), backbone, records, [1], 0)
    with pytest.raises(ValueError, match="each record's own edit"):
        first(RightEdit(), backbone, records, [1])
    assert Nudge.calls == []


def test_an_edit_before_every_prompt_is_read(tiny: Callable[..., Backbone], records: list[EditRecord]) -> None:
    """Editors that are no change of weights are asked the same way."""
    backbone = tiny()
    examples = [Example(str(i), f"Question {i} is", ("A",), tuple("ABCDEFGH")) for i in range(20)]
    plain = measure(Edited(backbone), Made(), examples)["examples"]
    with InContext().edit(backbone, [r.request for r in records]) as edited:
        told = measure(edited, Made(), examples)["examples"]
        assert told == measure(edited, Made(), examples, batch_size=3)["examples"]
    assert told != plain
