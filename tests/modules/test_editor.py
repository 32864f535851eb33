"""`Edited` against the plainest reference there is: one text at a time, no padding, no cache."""

import copy
import string
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from marked_words import marked

from datamodules.records import EditRequest
from datamodules.tokens import continuation, encode
from modules.backbone import Backbone, BackboneConfig, load_backbone
from modules.editor import Edited
from modules.training_free.icl import InContext, RightEdit, Unedited

# large weights, so that a wrong mask or position changes the answers of a random model
SHAPES = {
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 64,
        "initializer_range": 0.4,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 256, "initializer_range": 0.4},
}
CONTEXT = "Lyon is in Japan. Rome is in Peru.\n"
PROMPTS = ["Lyon is a city in", "x", "", "The capital of the country around Rome is", "Who?", "Oslo lies in"]
TARGETS = ["Japan", "yz", "free text", "the city of Lima", "N", "Norway, far up north"]


@pytest.fixture(scope="module", params=SHAPES)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    """Random weights; the most probable token is always a printable one, so that texts show every difference."""
    torch.manual_seed(0)
    backbone = load_backbone(BackboneConfig(f"random:{request.param}", overrides=SHAPES[request.param]))
    printable = backbone.tokenizer(string.ascii_letters + string.digits + " .,")["input_ids"]
    others = sorted(set(range(len(backbone.tokenizer))) - set(printable))
    backbone.model.get_output_embeddings().weight.data[others] = 0
    return backbone


def logits(backbone: Backbone, ids: list[int]) -> torch.Tensor:
    """Next-token logits [T, V] after each of ids, without padding, mask, positions or cache."""
    with torch.no_grad():
        return backbone.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(backbone: Backbone, text: str, n: int) -> str:
    ids = backbone.tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(n):
        ids = [*ids, int(logits(backbone, ids)[-1].argmax())]
    return backbone.tokenizer.decode(ids[start:])


@pytest.mark.parametrize("context", ["", CONTEXT], ids=["no_context", "context"])
@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_score_equals_one_text_at_a_time(backbone: Backbone, context: str, batch_size: int) -> None:
    scores = Edited(backbone, context=context).score(PROMPTS, TARGETS, batch_size=batch_size)
    assert len(scores) == len(PROMPTS)
    for prompt, target, score in zip(PROMPTS, TARGETS, scores, strict=True):
        row = encode(backbone.tokenizer, prompt, target, context=context)
        start = max(row.target_start, 1)  # nothing predicts a text's first token
        step = logits(backbone, list(row.ids))[start - 1 : -1].log_softmax(-1)
        expected = torch.tensor(row.ids[start:])
        torch.testing.assert_close(score.target, expected)
        torch.testing.assert_close(score.log_probs, step.gather(1, expected[:, None])[:, 0], atol=2e-4, rtol=1e-4)
        torch.testing.assert_close(score.predicted, step.argmax(-1))


@pytest.mark.parametrize("context", ["", CONTEXT], ids=["no_context", "context"])
def test_the_most_probable_tokens_are_given_where_they_are_asked_for(backbone: Backbone, context: str) -> None:
    edited = Edited(backbone, context=context)
    plain, more = edited.score(PROMPTS, TARGETS, 4), edited.score(PROMPTS, TARGETS, 4, top_k=3)
    for prompt, target, score, without in zip(PROMPTS, TARGETS, more, plain, strict=True):
        row = encode(backbone.tokenizer, prompt, target, context=context)
        step = logits(backbone, list(row.ids))[max(row.target_start, 1) - 1 : -1]
        assert torch.equal(score.top, step.topk(3).indices)
        assert torch.equal(score.top[:, 0], score.predicted)
        assert without.top.shape == (len(without.target), 0)
        assert torch.equal(score.log_probs, without.log_probs)


def test_words_after_a_context_are_those_of_one_text(backbone: Backbone) -> None:
    """Llama 2's tokenizer puts a space before a text's first word, which a prompt after a context must not have."""
    edited = Edited(replace(backbone, tokenizer=marked()), context="Lyon is in Japan.\n")
    (score,) = edited.score(["Lyon is in"], ["Japan"])
    row = encode(marked(), "Lyon is in", "Japan", context=edited.context)
    step = logits(backbone, list(row.ids))[row.target_start - 1 : -1].log_softmax(-1)
    torch.testing.assert_close(score.log_probs, step[range(len(step)), list(row.target_ids)], atol=2e-4, rtol=1e-4)
    (text,) = edited.generate(["Lyon is in"], 1)
    assert text == continuation(marked(), row.ids[:-1], [int(step[0].argmax())])


def test_tokens_before_a_prompt_are_those_of_the_context(backbone: Backbone) -> None:
    assert Edited(backbone).context_tokens(PROMPTS) == [0] * len(PROMPTS)
    assert Edited(backbone, context=CONTEXT).context_tokens(PROMPTS) == [len(CONTEXT)] * len(PROMPTS)  # a token a byte


def test_score_covers_the_whole_target_and_no_more(backbone: Backbone) -> None:
    # one token a byte: " Japan" is 6 with its space inside the prompt's side of the boundary or the target's
    (score,) = Edited(backbone).score(["Lyon is in"], ["Japan"])
    assert backbone.tokenizer.decode(score.target).strip() == "Japan"


def test_opening_token_without_anything_before_it_is_not_scored(backbone: Backbone) -> None:
    alone, pair = Edited(backbone).score(["", ""], ["a", "ab"])
    assert (len(alone.target), len(pair.target)) == (0, 1)
    assert alone.accuracy == 0.0
    (behind_context,) = Edited(backbone, context=CONTEXT).score([""], ["a"])
    assert len(behind_context.target) == 1


@pytest.mark.parametrize("context", ["", CONTEXT], ids=["no_context", "context"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_generate_equals_greedy_without_cache(backbone: Backbone, context: str, batch_size: int) -> None:
    prompts = [prompt for prompt in PROMPTS if prompt]
    texts = Edited(backbone, context=context).generate(prompts, max_new_tokens=10, batch_size=batch_size)
    assert texts == [greedy(backbone, context + prompt, 10) for prompt in prompts]
    assert len(set(texts)) > 2  # or equality would say little


def test_generate_stops_each_row_at_its_own_end_of_text(backbone: Backbone) -> None:
    prompts = [prompt for prompt in PROMPTS if prompt]
    whole = Edited(backbone).generate(prompts, max_new_tokens=10)
    end = next(c for c in whole[0][1:] if c != whole[0][0])
    tokenizer = copy.deepcopy(backbone.tokenizer)
    tokenizer.eos_token = end.replace(" ", "Ġ")
    cut = Edited(replace(backbone, tokenizer=tokenizer)).generate(prompts, max_new_tokens=10)
    assert cut == [text.split(end)[0] for text in whole]
    assert 0 < len(cut[0]) < len(whole[0])


def test_context_may_be_used_again_after_score_and_generate(backbone: Backbone) -> None:
    edited = Edited(backbone, context=CONTEXT)
    first = edited.score(PROMPTS, TARGETS, batch_size=2)
    edited.generate(["Lyon", "Rome is in"], max_new_tokens=4)
    again = edited.score(PROMPTS, TARGETS, batch_size=2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.log_probs, b.log_probs)


def test_empty_batch(backbone: Backbone) -> None:
    assert Edited(backbone).score([], []) == []
    assert Edited(backbone).generate([]) == []


def test_generate_needs_a_prompt(backbone: Backbone) -> None:
    for edited in (Edited(backbone), Edited(backbone, context=CONTEXT)):
        with pytest.raises(ValueError, match="empty"):
            edited.generate(["Lyon is", ""])


def test_prompts_and_targets_must_pair_up(backbone: Backbone) -> None:
    with pytest.raises(ValueError, match="zip"):
        Edited(backbone).score(["a", "b"], ["c"])


def test_beyond_the_context_window_is_refused(backbone: Backbone) -> None:
    small = backbone.config.overrides | {"max_position_embeddings": 40}
    backbone = load_backbone(replace(backbone.config, overrides=small))
    edited = Edited(backbone, context="a" * 30)
    edited.score(["bcd"], ["efghij"])  # 30 + 3 + 1 for the space + 6 = 40
    edited.generate(["bcd"], max_new_tokens=8)  # 30 + 3 + 8, the last of which is not read
    with pytest.raises(ValueError, match=r"41 tokens .* window of 40"):
        edited.score(["bcd"], ["efghijk"])
    with pytest.raises(ValueError, match=r"41 tokens .* window of 40"):
        edited.generate(["bcd"], max_new_tokens=9)
    with pytest.raises(ValueError, match=r"41 tokens .* window of 40"):
        Edited(backbone).score(["a" * 34], ["efghij"])
    with pytest.raises(ValueError, match="window has 40"):
        InContext().edit(backbone, [EditRequest(text="a" * 40)]).__enter__()


def test_in_context_stands_before_every_prompt_in_a_seeded_order(backbone: Backbone) -> None:
    requests = [EditRequest(f"City {i} is in", f"Land {i}") for i in range(6)] + [EditRequest("City 0 is in", "Land 0")]
    with InContext(seed=0).edit(backbone, requests) as edited, InContext(seed=0).edit(backbone, requests) as same:
        statements = {r.statement for r in requests}
        assert edited.context == same.context
        assert edited.context.endswith(".\n")
        assert {s.strip() + "." for s in edited.context.strip().removesuffix(".").split(".")} == statements
    orders = set()
    for seed in range(5):
        with InContext(seed=seed).edit(backbone, requests) as other:
            orders.add(other.context)
    assert len(orders) > 1


def test_editors_leave_the_backbone_alone_and_say_what_they_are(backbone: Backbone) -> None:
    before = {k: v.clone() for k, v in backbone.model.state_dict().items()}
    for editor in (Unedited(), InContext(), RightEdit()):
        with editor.edit(backbone, [EditRequest("Lyon is in", "Japan")]) as edited:
            edited.score(["Lyon is in"], ["Japan"])
    assert all(torch.equal(v, before[k]) for k, v in backbone.model.state_dict().items())
    assert (Unedited.own_edit_only, InContext.own_edit_only, RightEdit.own_edit_only) == (False, False, True)


def test_more_answers_than_there_are_tokens_are_all(tiny: Callable[..., Backbone]) -> None:
    """An editor's second model may have a smaller vocabulary than the one it was asked for."""
    edited = Edited(tiny())
    width = edited.backbone.logits(torch.zeros(1, edited.backbone.hidden_size)).shape[-1]
    (score,) = edited.score(["City A is in"], ["B"], top_k=width + 5)
    assert score.top.shape == (2, width)
    assert sorted(score.top[0].tolist()) == list(range(width))
