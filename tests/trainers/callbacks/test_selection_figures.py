"""Figures of selection, and what they are drawn from."""

import math
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from callback_runs import STEPS, fit, scalars

from datamodules.records import EditRequest, Query
from modules.byte_tokenizer import byte_tokenizer
from modules.gist.analysis import ask, in_and_out_of_scope, profile
from modules.training_free.icl import Unedited
from trainers.callbacks.common import validation_records
from trainers.callbacks.selection_figures import SelectionFigures


def test_selection_is_logged_after_each_validation(run):
    images = set(run.events.Tags()["images"])
    assert {f"selection/{n}" for n in ("heat_map_0", "heat_map_1", "layer_profile", "token_trace")} == images
    assert [e.step for e in run.events.Images("selection/heat_map_0")] == [1, 2]
    names = ("zero_gist_in_scope", "zero_gist_out_of_scope", "golden", "entropy")
    values = {n: scalars(run.events, f"selection/{n}") for n in names}
    assert all(len(v) == STEPS for v in values.values())
    assert all(0 < p < 1 for n in names[:3] for p in values[n])
    assert all(0 < nats <= math.log(5) for nats in values["entropy"])


def test_selection_has_a_panel_per_layer_or_one_for_all(run):
    titles = [a.get_title() for a in run.figures[0].axes if a.get_images() and a.get_title()]
    assert titles == (["layer 2", "layer 3"] if run.selection == "qk" else ["all active layers (2-3)"])
    assert len(run.figures) == 2 * STEPS


def test_selection_scalars_are_those_of_the_trained_model(run):
    records = run.trainer.datamodule.validation_records()[:4]
    editor = run.module.editor()
    with editor.edit(editor.model.backbone, [r.request for r in records]) as edited:
        inside, outside = in_and_out_of_scope(edited, records)
    assert [s.golden for s in inside] == [0, 1, 2, 3]
    assert [s.golden for s in outside] == [None] * len(outside)
    assert len(outside) > 0
    first, query = inside[0], records[0].rephrases[0]
    assert len(first.tokens) == len(f"{query.prompt} {query.target}".encode()) - 1  # the tokens are bytes
    assert len(first.tokens) - first.answer_from == len(f" {query.target}".encode())
    assert float(first.probabilities.sum(-1).min()) == pytest.approx(1, abs=1e-4)
    assert scalars(run.events, "selection/golden")[-1] == pytest.approx(float(profile(inside).golden.mean()), rel=1e-4)
    outside_zero = float(profile(outside).zero.mean())
    assert scalars(run.events, "selection/zero_gist_out_of_scope")[-1] == pytest.approx(outside_zero, rel=1e-4)


def test_ask_knows_right_from_wrong_and_golden_from_zero():
    tokenizer = byte_tokenizer()
    logp = torch.randn(2, 8, 3).log_softmax(-1)

    def decode(ids, mask, trace):
        trace |= {0: logp, 1: logp}
        states = F.one_hot(ids.roll(-1, 1), len(tokenizer)).float()  # each token predicts the next one
        states[1, 3] = states[1, 2]
        return SimpleNamespace(last_hidden_state=states), None

    model = SimpleNamespace(get_output_embeddings=torch.nn.Identity)
    backbone = SimpleNamespace(tokenizer=tokenizer, device=torch.device("cpu"), model=model)
    edited: Any = SimpleNamespace(backbone=backbone, bos=False, decode=decode, requests=[EditRequest("q", "a")])
    right, wrong = ask(edited, [Query("what", ("yes",)), Query("who", ("you",))], [0, None])
    assert (right.right, wrong.right) == (True, False)
    assert (right.golden, wrong.golden) == (0, None)
    assert (right.edit, wrong.edit) == ("q a.", "")
    assert right.tokens == [*"what", "␣", *"ye"]
    assert (right.answer_from, wrong.answer_from) == (3, 2)  # the prompt's last token predicts the space before it
    assert right.probabilities.shape == (1, 7, 3)  # one choice for both layers
    torch.testing.assert_close(wrong.probabilities[0], logp[1, :6].exp())


def test_selection_every_second_validation(tmp_path, cache):
    watched = fit(tmp_path, cache, [SelectionFigures(4, 1, every_n_validations=2)], max_steps=3)
    assert [e.step for e in watched.events.Images("selection/heat_map_0")] == [1, 3]


def test_selection_needs_gists_and_records():
    trainer: Any = SimpleNamespace(sanity_checking=False)
    module: Any = SimpleNamespace(editor=Unedited, original=None)
    with pytest.raises(TypeError, match="'unedited' has no gists"):
        SelectionFigures().on_validation_epoch_end(trainer, module)
    with pytest.raises(TypeError, match=r"editor\(\) and original\(\)"):
        SelectionFigures().on_validation_epoch_end(trainer, L.LightningModule())
    with pytest.raises(TypeError, match="validation_records"):
        validation_records(trainer, 1)
    with pytest.raises(ValueError, match="at least 1"):
        SelectionFigures(records=0)
