"""What is kept of the teacher is what the teacher says."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from told import RightEdit

from datamodules.records import EditRecord, EditRequest
from datamodules.sources import Source
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.distill.loss import Full, Top
from modules.distill.queries import DistillQueries, Question, questions_of
from modules.distill.store import Answered, Teaching, file_of, teach
from modules.distill.teacher import Asked, asked_of, last_states, shared_start
from modules.fingerprint import weights_hash
from modules.losses import head_of
from modules.training_free.mike import MIKE


def live(backbone: Backbone, asked: Asked) -> torch.Tensor:
    """Log-probabilities [n, V] at a target's tokens: the whole text in one row, nothing shared."""
    q = asked.question
    row = encode(backbone.tokenizer, q.prompt, q.target, asked.context or "")
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([row.ids])).logits[0]
    return logits[row.target_start - 1 : len(row.ids) - 1].log_softmax(-1)


@pytest.fixture
def questions(records: list[EditRecord]) -> list[Question]:
    return [q for r in records for q in questions_of(r, DistillQueries())]


def taught(backbone: Backbone, records: list[EditRecord], questions: list[Question]) -> list[Asked]:
    with RightEdit().edit(backbone, [r.request for r in records]) as edited:
        return asked_of(edited, backbone, questions)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gptj", "qwen3"])
def test_shared_passes_are_whole_ones(
    tiny: Callable[..., Backbone], records: list[EditRecord], questions: list[Question], kind: str
) -> None:
    backbone = tiny(kind)
    asked = taught(backbone, records, questions)
    assert {a.context is None for a in asked} == {True, False}
    done: list[int] = []
    states = last_states(backbone, asked, 5, done.append)
    assert sum(done) == len(questions)
    head = head_of(backbone.model)
    for one, state in zip(asked, states, strict=True):
        torch.testing.assert_close(head.log_probs(state), live(backbone, one), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("top_k", [None, 7])
def test_kept_is_live(
    tiny: Callable[..., Backbone],
    records: list[EditRecord],
    questions: list[Question],
    tmp_path: Path,
    top_k: int | None,
) -> None:
    backbone = tiny()
    asked, options = taught(backbone, records, questions), Teaching(top_k, 4, str(tmp_path))
    files = []
    for part in (asked[:9], asked[9:]):
        files.append(file_of(options, backbone, weights_hash(backbone.model), part))
        teach(options, backbone, part, files[-1])
    answered = Answered(files)
    assert len(answered) == len(questions)
    some = [asked[11], asked[2], asked[3]]
    found, inside = answered.look_up([a.question for a in some], torch.device("cpu"))
    expected = torch.cat([live(backbone, a) for a in some])
    assert inside.tolist() == [a.context is not None for a in some]
    if top_k is None:
        assert isinstance(found, Full)
        torch.testing.assert_close(head_of(backbone.model).log_probs(found.hidden), expected, atol=1e-5, rtol=1e-4)
        assert "kept" not in answered.said()
    else:
        assert isinstance(found, Top)
        torch.testing.assert_close(found.log_probs, expected.topk(top_k).values, atol=1e-5, rtol=1e-4)
        left = 1 - expected.topk(top_k).values.exp().sum(1)
        torch.testing.assert_close(found.rest.exp(), left, atol=1e-5, rtol=1e-4)
        every = torch.cat([live(backbone, a) for a in asked]).topk(top_k).values.exp().sum(1)
        assert f"probability of {(1 - every).mean():.2g} (at most {(1 - every).max():.2g})" in answered.said()


def test_file_names_what_it_is_made_of(
    tiny: Callable[..., Backbone], records: list[EditRecord], questions: list[Question]
) -> None:
    backbone = tiny()
    asked = taught(backbone, records, questions)
    plain = file_of(Teaching(), backbone, "w", asked)
    assert plain == file_of(Teaching(batch_size=3), backbone, "w", asked)  # which changes nothing
    other = Asked(asked[0].question, "Something else. ", asked[0].row)
    assert len({plain, *(file_of(Teaching(), backbone, "w", a) for a in (asked[1:], [other, *asked[1:]]))}) == 3
    assert plain != file_of(Teaching(), backbone, "v", asked)
    assert plain != file_of(Teaching(top_k=3), backbone, "w", asked)


def test_damaged_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.safetensors is missing.*shared by all machines"):
        Answered([tmp_path / "nothing.safetensors"])
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"bad\.safetensors cannot be read.*remove it"):
        Answered([tmp_path / "bad.safetensors"])


def test_a_context_that_changes_the_target_is_refused(tiny: Callable[..., Backbone]) -> None:
    """A made-up tokenizer that joins the target with what stands before it only after a context."""
    backbone = tiny()

    class Merging:
        def __init__(self, own: Any) -> None:
            self.own, self.bos_token_id = own, own.bos_token_id
            self._palimpsest_adds_bos = False

        def __call__(self, text: str, **options: Any) -> Any:
            out = self.own(text, **options)
            if text.startswith("New Fact") and text.endswith("me"):  # "me" as one token
                ids, offsets = out["input_ids"][:-2], out["offset_mapping"][:-2]
                out = {"input_ids": [*ids, 7], "offset_mapping": [*offsets, (len(text) - 2, len(text))]}
            return out

    with RightEdit().edit(backbone, [EditRequest("A is", "me", "A")]) as edited:
        backbone.tokenizer = Merging(backbone.tokenizer)  # type: ignore[assignment]
        with pytest.raises(ValueError, match=r"target 'me' after 'A is'.*cannot be distilled"):
            asked_of(edited, backbone, [Question("A is", "me")])


def test_shared_start() -> None:
    assert shared_start([(1, 2, 3), (1, 2, 4), (1, 2)]) == 2
    assert shared_start([(1, 2), (1, 2)]) == 2
    assert shared_start([(5,), (6,)]) == 0


class Letters:
    """Sentences as counts of their letters: an encoder that loads nothing."""

    name, width = "letters", 26

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        counts = torch.tensor([[t.lower().count(chr(97 + i)) for i in range(26)] for t in texts])
        return torch.nn.functional.normalize(counts.float() + 0.01, dim=1)


def test_kept_is_what_mike_says(
    tiny: Callable[..., Backbone], records: list[EditRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By MIKE's own scores, with demonstrations before prompts in scope."""
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    shown = tmp_path / "shown.jsonl"
    shown.write_text("\n".join(r.to_json() for r in records[2:]), encoding="utf-8")
    mike = MIKE([Source("records", str(shown))], k=2)
    mike.__dict__["sentences"] = Letters()
    backbone, edits = tiny(max_position_embeddings=1024), records[:2]
    questions = [q for r in edits for q in questions_of(r, DistillQueries())]
    with mike.edit(backbone, [r.request for r in edits]) as edited:
        asked = asked_of(edited, backbone, questions)
        expected = edited.score(*map(list, zip(*questions, strict=True)))
    assert {(a.context or "").count("New Fact") for a in asked} == {0, 3}
    file = file_of(Teaching(), backbone, "w", asked)
    teach(Teaching(), backbone, asked, file)
    found, inside = Answered([file]).look_up(questions, torch.device("cpu"))
    assert isinstance(found, Full)
    labels = torch.cat([score.target for score in expected])
    logp = head_of(backbone.model).log_probs(found.hidden).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(logp, torch.cat([score.log_probs for score in expected]), atol=1e-5, rtol=1e-4)
    assert inside.tolist() == [a.context is not None for a in asked]
