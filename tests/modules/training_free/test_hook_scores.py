"""Z-scores of hook layers on texts: against a plain calculation from the model's own activations."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from datamodules.records import EditRecord
from modules.backbone import Backbone
from modules.training_free import CoachHook
from modules.training_free.coachhook import HookedEdited
from modules.training_free.hook_layer import Scope
from modules.training_free.hook_scores import hook_scores, texts_of
from modules.training_free.second_moments import Moments
from modules.training_free.templates import Contexts
from modules.training_free.value_options import ValueOptions

FIRST = "model.layers.1.mlp.down_proj"


def editor(folder: Path) -> CoachHook:
    return CoachHook(
        layers=[1, 2],
        moments=Moments(tokens=400, length=40, folder=str(folder)),
        contexts=Contexts(counts={8: 2}),
        values=ValueOptions(steps=8, lr=0.2),
        scope=Scope(alpha=0.5, dynamic=False, short=None),
    )


def test_scores_of_every_kind_of_text(tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path) -> None:
    llama = tiny("llama")
    with editor(tmp_path).edit(llama, [r.request for r in records]) as edited:
        assert isinstance(edited, HookedEdited)
        texts = texts_of(edited, records)
        found = hook_scores(edited, texts, batch_size=3)
        apart = hook_scores(edited, texts, batch_size=1)
        term = edited.terms[FIRST]
        wanted = []
        for text in texts:
            inputs: list[torch.Tensor] = []
            layer = llama.model.get_submodule(FIRST)
            handle = layer.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
            llama.model.base_model(torch.tensor([text.ids]))
            handle.remove()
            norms = term(inputs[0])[0].norm(dim=-1).double()  # [T]
            scores = (norms - norms.mean()) / norms.std()
            wanted.append(float(scores.max() if text.at is None else scores[text.at]))
    assert {t.kind for t in texts} >= {"reliability", "locality"}
    assert len(found) == 2 * len(texts)
    # a layer's scores by batches, which come in the order of length, against one text at a time
    by_layer = [s for s in found if s.layer == FIRST]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].ids))
    assert [s.score for s in by_layer] == pytest.approx([wanted[i] for i in order], abs=1e-4)
    assert [s.open for s in by_layer] == [s.score is not None and s.score >= 0.5 for s in by_layer]
    key = lambda s: (s.layer, s.kind, s.score or 0.0)  # noqa: E731
    assert [s.score for s in sorted(apart, key=key)] == pytest.approx(
        [s.score for s in sorted(found, key=key)], abs=1e-4
    )


def test_rephrases_without_the_subject_are_left_out(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path
) -> None:
    llama = tiny("llama")
    with editor(tmp_path).edit(llama, [records[0].request]) as edited:
        assert isinstance(edited, HookedEdited)
        texts = texts_of(edited, records[:1])
    naming = [q for q in records[0].rephrases if str(records[0].request.subject) in q.prompt]
    assert [t.kind for t in texts].count("generality") == len(naming)
    assert all(t.at is None for t in texts if t.kind == "locality")
