"""Text before prompts against the plainest reference: each whole text read alone, without a cache."""

import string
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bag_of_words import BagOfWords
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.records import EditRequest
from datamodules.tokens import encode
from modules.backbone import Backbone
from modules.editor import Edited
from modules.memory import EditMemory
from modules.prompted import Context, Prompted, PromptEditor

REQUESTS = [EditRequest("City A is in", "Peru", "City A")]
LONG = Context("Lyon is in Japan.\nPrompt: ", ("Rome is in Peru. ", "Oslo is in Chad. "))
SHORT = Context("Rome is in Peru.\n")
SAID = {
    "Lyon is a city in": LONG,
    "Where is Lyon? In": LONG,
    "L": LONG,
    "": LONG,
    "Rome is in": SHORT,
    "Oslo is in": None,
    "Who? We, and": None,
}
TARGETS = ["Japan", "a far, far away land", "yon", "free text", "Peru", "Norway", "me"]


class Says(PromptEditor):
    """Says what a table has for each prompt."""

    name = "says"

    def __init__(self, table: dict[str, Context | None]) -> None:
        self.table = table
        self.sentences = BagOfWords()  # type: ignore[assignment]
        self.asked: list[str] = []

    def tell(self, memory: EditMemory, prompts: Sequence[str]) -> list[Context | None]:
        self.asked += prompts
        return [self.table[prompt] for prompt in prompts]


def told(backbone: Backbone, table: dict[str, Context | None] = SAID) -> Prompted:
    edited = Says(table).unedited(backbone).add(REQUESTS)
    assert isinstance(edited, Prompted)
    return edited


def with_merges(backbone: Backbone) -> Backbone:
    """The backbone with a BPE tokenizer, in which a space belongs to the word after it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    texts = ["Lyon is a city in Japan", "Prompt: Lyon is", "Where is Rome? In Peru", "far away land"] * 4
    kind = trainers.BpeTrainer(vocab_size=250, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, kind)
    backbone.tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    return backbone


def printable(backbone: Backbone) -> Backbone:
    """The most probable token is always a letter, so that texts show every difference."""
    letters = backbone.tokenizer(string.ascii_letters + " .,")["input_ids"]
    others = sorted(set(range(len(backbone.tokenizer))) - set(letters))
    backbone.model.get_output_embeddings().weight.data[others] = 0
    return backbone


@pytest.mark.parametrize("merges", [False, True], ids=["bytes", "merges"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_scores_are_those_of_the_whole_text(
    tiny: Callable[..., Backbone], kind: str, batch_size: int, merges: bool
) -> None:
    backbone = with_merges(tiny(kind)) if merges else tiny(kind)
    prompts, targets = list(SAID) * 2, [*TARGETS, *reversed(TARGETS)]
    scores = told(backbone).score(prompts, targets, batch_size, top_k=2)
    for prompt, target, score in zip(prompts, targets, scores, strict=True):
        context = said.text() if (said := SAID[prompt]) else ""
        row = encode(backbone.tokenizer, prompt, target, context)
        with torch.no_grad():
            logits = backbone.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0].float()
        step = logits[row.target_start - 1 : -1].log_softmax(-1)
        assert score.target.tolist() == list(row.target_ids)
        torch.testing.assert_close(score.log_probs, step.gather(1, score.target[:, None])[:, 0], atol=2e-4, rtol=1e-4)
        assert torch.equal(score.top, step.topk(2).indices)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_continuations_are_those_of_the_whole_text(tiny: Callable[..., Backbone], kind: str) -> None:
    backbone = printable(tiny(kind))
    prompts = [prompt for prompt in SAID if prompt]
    texts = told(backbone).generate(prompts, max_new_tokens=6, batch_size=2)
    for prompt, text in zip(prompts, texts, strict=True):
        context = said.text() if (said := SAID[prompt]) else ""
        assert text == Edited(backbone).generate([context + prompt], max_new_tokens=6)[0]
    with pytest.raises(ValueError, match="empty"):
        told(backbone).generate([""])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_a_prompt_without_context_is_answered_bit_for_bit_as_unedited(
    tiny: Callable[..., Backbone], kind: str, batch_size: int
) -> None:
    backbone = tiny(kind)
    out = [prompt for prompt in SAID if SAID[prompt] is None]
    plain, edited = Edited(backbone), told(backbone)
    scores = edited.score([*SAID, *out], ["Peru"] * (len(SAID) + len(out)), batch_size)
    unedited = plain.score([*out, *out], ["Peru"] * 2 * len(out), batch_size)
    kept = [s for prompt, s in zip([*SAID, *out], scores, strict=True) if SAID[prompt] is None]
    for a, b in zip(kept, unedited, strict=True):
        assert torch.equal(a.log_probs, b.log_probs)
        assert torch.equal(a.predicted, b.predicted)
    prompts = [prompt for prompt in SAID if prompt]
    texts = dict(zip(prompts, edited.generate(prompts, batch_size=batch_size), strict=True))
    assert [texts[prompt] for prompt in out] == plain.generate(out, batch_size=batch_size)


def test_what_prompts_share_is_read_once(tiny: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, read = tiny(), []
    decode = Edited.decode

    def counted(self: Edited, ids: torch.Tensor, *args: Any, **options: Any) -> Any:
        read.append(ids.numel())
        return decode(self, ids, *args, **options)

    monkeypatch.setattr(Edited, "decode", counted)
    prompts = [f"Where is Lyon? {i}" for i in range(8)]
    told(backbone, dict.fromkeys(prompts, LONG)).score(prompts, ["Japan"] * 8)
    assert sum(read) < len(LONG.text()) + 8 * len("here is Lyon? 0 Japan")
    read.clear()
    told(backbone, {p: Context(f"{i}{LONG.text()}") for i, p in enumerate(prompts)}).score(prompts, ["Japan"] * 8)
    assert len(read) == 1  # nothing to share: one batch of them all


def test_the_farthest_parts_go_where_the_window_is_short(tiny: Callable[..., Backbone]) -> None:
    prompt, last = "p" * 10, "last: "
    context = Context(last, ("a" * 20, "b" * 20, "c" * 20))
    for window, parts in ((140, "abc"), (108, "abc"), (107, "bc"), (88, "bc"), (87, "c"), (67, ""), (40, "")):
        edited = told(tiny(max_position_embeddings=window), {prompt: context})
        assert edited.contexts([prompt]) == ["".join(part * 20 for part in parts) + last]
        assert (
            edited.contexts([prompt], room=0)[0]
            == "".join(part * 20 for part in ("abc" if window >= 76 else "bc" if window >= 56 else "c")) + last
        )
    edited = told(tiny(max_position_embeddings=107), {prompt: context})
    (score,) = edited.score([prompt], ["t" * 60])
    row = encode(edited.backbone.tokenizer, prompt, "t" * 60, "c" * 20 + last)
    assert len(row.ids) == 97  # with the space; two parts would make it 117
    with torch.no_grad():
        logits = edited.backbone.model(input_ids=torch.tensor([row.ids])).logits[0].float()
    expected = logits[row.target_start - 1 : -1].log_softmax(-1).gather(1, score.target[:, None])[:, 0]
    torch.testing.assert_close(score.log_probs, expected, atol=2e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="window of 107"):
        edited.score([prompt], ["t" * 100])
    assert edited.generate([prompt], max_new_tokens=90)
    with pytest.raises(ValueError, match="window of 107"):
        edited.generate([prompt], max_new_tokens=93)


def test_each_prompt_is_told_once_and_tokens_are_counted(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    edited = told(backbone)
    prompts = list(SAID)
    expected = [len(said.text()) if said else 0 for said in SAID.values()]
    assert edited.context_tokens(prompts) == expected  # a token a byte
    edited.score(prompts, TARGETS)
    edited.contexts([*prompts, *prompts])
    assert isinstance(edited.editor, Says)
    assert edited.editor.asked == prompts


def test_without_edits_nothing_is_told(tiny: Callable[..., Backbone]) -> None:
    backbone = tiny()
    with Says({}).edit(backbone, []) as edited:
        assert isinstance(edited, Prompted)
        assert edited.contexts(list(SAID)) == [None] * len(SAID)
        a, b = edited.score(list(SAID), TARGETS), Edited(backbone).score(list(SAID), TARGETS)
        assert all(torch.equal(x.log_probs, y.log_probs) for x, y in zip(a, b, strict=True))
        assert (edited.score([], []), edited.generate([])) == ([], [])
    with pytest.raises(ValueError, match="zip"):
        told(backbone).score(["Oslo is in"], [])
