"""What prompts begin with alike is read once, and their answers are those of each text read alone."""

import random
from collections.abc import Callable

import pytest
import torch
from transformers import Qwen3NextConfig
from transformers.cache_utils import DynamicLayer

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited
from modules.prefixes import PASS, STEP, Roomy, alike, can_share, repeated
from modules.training_free import FTM, GRACE, ROME, CoachHook, LoRA, TPatcher
from modules.training_free.icl import InContext, Unedited

SHOTS = "Q: Where is Lyon? A: France\nQ: Where is Rome? A: Italy\nQ: Where is Lima? A: Peru\n" * 2
OTHER = "The capital of Chad is N'Djamena, that of Japan is Tokyo, and that of Norway is Oslo, as all know. "
PROMPTS = [
    *(f"{SHOTS}Q: Where is {place}? A:" for place in ("Oslo", "Tokyo", "Paris", "Oslo", "Timbuktu", "Bern")),
    "City A is in",
    *(f"{OTHER}And {place} is in" for place in ("City A", "Nara", "Kyoto", "Asti", "Bergen")),
    "Who is it",
]
TARGETS = ["Norway", "Japan", "a far, far away land", "Chad", "Mali", "it", "Peru"] * 2
EDITS = [EditRequest("City A is in", "Peru", "City A"), EditRequest("Oslo is in", "Chad", "Oslo")]
PLAIN = [Unedited(), InContext(), ROME(), FTM(steps=3), LoRA(steps=3), TPatcher(steps=5, samples=2, sample_tokens=4)]
LOOKING = [CoachHook(moments=None), GRACE(steps=3)]  # they judge a token among its text, or know where the prompt ends


@pytest.fixture
def backbone(tiny: Callable[..., Backbone]) -> Backbone:
    return tiny("llama")


def read(edited: Edited, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of tokens of all passes from now on."""
    seen: list[int] = []
    decode = edited.backbone.model.base_model.forward

    def counted(*args: object, **inputs: object) -> object:
        ids = inputs["input_ids"]
        assert isinstance(ids, torch.Tensor)
        seen.append(ids.numel())
        return decode(*args, **inputs)

    monkeypatch.setattr(edited.backbone.model.base_model, "forward", counted)
    return seen


def whole(backbone: Backbone, prompt: str, target: str) -> torch.Tensor:
    """Log-probabilities of the target's tokens in one pass over the whole text."""
    row = encode(backbone.tokenizer, prompt, target)
    with torch.no_grad():
        logits = backbone.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float()
    labels = torch.tensor(row.target_ids)[:, None]
    return logits[row.target_start - 1 : -1].log_softmax(-1).gather(1, labels)[:, 0]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("editor", PLAIN, ids=lambda e: e.name)
def test_answers_are_those_of_each_text_alone(tiny: Callable[..., Backbone], editor: object, kind: str) -> None:
    backbone = tiny(kind)
    with editor.edit(backbone, EDITS) as edited:  # type: ignore[attr-defined]
        together = edited.score(PROMPTS, TARGETS[: len(PROMPTS)], batch_size=3)
        texts = edited.generate(PROMPTS, max_new_tokens=4, batch_size=3)
        for prompt, target, score, text in zip(PROMPTS, TARGETS, together, texts, strict=False):
            (alone,) = edited.score([prompt], [target])
            torch.testing.assert_close(score.log_probs, alone.log_probs, atol=2e-4, rtol=1e-4)
            assert torch.equal(score.target, alone.target)
            assert text == edited.generate([prompt], max_new_tokens=4)[0]


@pytest.mark.parametrize("editor", PLAIN, ids=lambda e: e.name)
def test_what_prompts_share_is_read_once(backbone: Backbone, editor: object, monkeypatch: pytest.MonkeyPatch) -> None:
    with editor.edit(backbone, EDITS) as edited:  # type: ignore[attr-defined]
        edited.score(PROMPTS[:1], TARGETS[:1])  # the context, where there is one
        seen = read(edited, monkeypatch)
        edited.score(PROMPTS, TARGETS[: len(PROMPTS)])
        assert sum(seen) < len(SHOTS) + len(OTHER) + 70 * len(PROMPTS)
        seen.clear()
        edited.generate(PROMPTS, max_new_tokens=1)
        assert sum(seen) < len(SHOTS) + len(OTHER) + 70 * len(PROMPTS)


@pytest.mark.parametrize("editor", LOOKING, ids=lambda e: e.name)
def test_an_editor_that_looks_at_whole_texts_reads_them_whole(
    backbone: Backbone, editor: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    with editor.edit(backbone, EDITS) as edited:  # type: ignore[attr-defined]
        seen = read(edited, monkeypatch)
        edited.score(PROMPTS, TARGETS[: len(PROMPTS)], batch_size=1)
        assert len(seen) == len(PROMPTS)


def test_a_subclass_with_a_pass_of_its_own_reads_whole_texts(backbone: Backbone) -> None:
    class Own(Edited):
        def decode(self, *args: object, **options: object) -> object:  # type: ignore[override]
            return super().decode(*args, **options)  # type: ignore[arg-type]

    assert Edited(backbone).shares_prefixes
    assert not Own(backbone).shares_prefixes


def test_groups_read_the_fewest_tokens() -> None:
    random.seed(0)
    base = [tuple(random.choices(range(9), k=STEP * 6)) for _ in range(3)]
    rows = [
        *(base[0] + (i, i) for i in range(4)),  # all of it shared
        *(base[1][: STEP * 5] + (i,) * (STEP + 9) for i in range(6)),
        *((i,) * 5 for i in range(4)),  # too short
        *((*base[2][:STEP], i) for i in range(2)),  # too few
    ]
    rows[6] = rows[7] = base[1][: STEP * 5] + (7,) * STEP  # two of six share more, but not enough for a pass
    found = alike(rows, [len(row) for row in rows])
    assert sorted(found) == [
        ([0, 1, 2, 3], 6 * STEP),
        ([4, 5, 6, 7, 8, 9], 5 * STEP),
        ([10, 11, 12, 13, 14, 15], 0),
    ]
    assert alike(rows, [0] * len(rows)) == [(list(range(len(rows))), 0)]
    assert [group.shared for group in alike(rows, [5 * STEP - 3] * len(rows))] == [0, 5 * STEP - 3, 5 * STEP - 3]
    assert alike([], []) == []


def test_more_rows_with_more_in_common_are_a_group_of_their_own() -> None:
    common, own = (1,) * STEP * 2, (2,) * STEP * 8
    rows = [(*common, 9, i) for i in range(3)] + [common + own + (i,) for i in range(5)]
    assert alike(rows, [len(row) for row in rows]) == [([0, 1, 2], 0), ([3, 4, 5, 6, 7], 10 * STEP)]
    few = [*rows[:3] * 9, *rows[3:5]]  # 29 rows save more together than two of them apart
    assert alike(few, [len(row) for row in few]) == [(list(range(29)), 2 * STEP)]
    assert 28 * 2 * STEP - PASS > 10 * STEP - PASS


def test_keys_and_values_with_room_are_those_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.prefixes.ROOM", 3)
    draw = torch.Generator().manual_seed(0)
    first = [torch.randn(2, 3, 5, 4, generator=draw) for _ in "kv"]
    plain, roomy = DynamicLayer(), Roomy(*first)
    plain.update(*first)
    for length in (1, 2, 1, 1, 7, 1):
        new = [torch.randn(2, 3, length, 4, generator=draw) for _ in "kv"]
        for expected, found in zip(plain.update(*new), roomy.update(*new), strict=True):
            assert torch.equal(found, expected)
        assert roomy.get_seq_length() == plain.get_seq_length()
        if length == 2:  # the layer is put into another order from outside
            for layer in (plain, roomy):
                layer.reorder_cache(torch.tensor([1, 0]))


def test_rows_that_go_on_do_not_touch_what_they_go_on_from(backbone: Backbone) -> None:
    ids = torch.tensor([encode(backbone.tokenizer, SHOTS).ids])
    with torch.no_grad():
        cached = backbone.decode(input_ids=ids, use_cache=True).cache
        before = [layer.keys.clone() for layer in cached.layers]
        once, again = repeated(cached, 1), repeated(repeated(cached, 1), 3)
        for cache, rows in ((once, 1), (again, 3), (repeated(once, 2), 2)):
            backbone.decode(input_ids=torch.ones(rows, 2, dtype=torch.long), cache=cache, use_cache=True)
    assert once.get_seq_length() == again.get_seq_length() == len(ids[0]) + 2
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cached.layers, before, strict=True))


def test_recurrent_layers_share_nothing() -> None:
    assert not can_share(Qwen3NextConfig(num_hidden_layers=4))


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_a_window_that_slides_reads_on_after_a_context_longer_than_it(tiny: Callable[..., Backbone], kind: str) -> None:
    some = {"use_sliding_window": True, "max_window_layers": 0, "layer_types": None} if kind == "qwen3" else {}
    backbone = tiny(kind, sliding_window=16, **some)
    assert kind == "mistral" or "sliding_attention" in backbone.model.config.layer_types
    together = Edited(backbone).score(PROMPTS, TARGETS[: len(PROMPTS)])
    behind = Edited(backbone, context=SHOTS).score(PROMPTS[6:7], TARGETS[6:7])
    for prompt, target, score in zip(PROMPTS, TARGETS, together, strict=False):
        torch.testing.assert_close(score.log_probs, whole(backbone, prompt, target), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(
        behind[0].log_probs, whole(backbone, SHOTS + PROMPTS[6], TARGETS[6]), atol=2e-4, rtol=1e-4
    )
