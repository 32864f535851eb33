"""Prompts and targets to tokens: one rule for spaces, offsets across merges, and a BOS only where it belongs."""

import pytest
from marked_words import marked
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from datamodules.tokens import adds_bos, continuation, encode, encode_subject, pad, pad_id, windows
from modules.byte_tokenizer import byte_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def bpe(merges: list[tuple[str, str]], bos: bool = False, eos: bool = False) -> PreTrainedTokenizerBase:
    """Bytes with a few merges; like Llama's tokenizer it may put a BOS in front of, and an EOS behind, each text."""
    vocab = {c: i for i, c in enumerate(ALPHABET)}
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    core.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    if bos or eos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single=("<s> " if bos else "") + "$A" + (" </s>" if eos else ""),
            special_tokens=[(t, core.token_to_id(t)) for t in ("<s>", "</s>")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("prompt", "target", "text", "scored"),
    [
        ("Lyon is in", "Japan", "Lyon is in Japan", " Japan"),
        ("Lyon is in", " Japan", "Lyon is in Japan", " Japan"),
        ("Lyon is in ", "Japan", "Lyon is in Japan", "Japan"),
        ("Lyon is in\n", "Japan", "Lyon is in\nJapan", "Japan"),
        ("", "Japan", "Japan", "Japan"),
        ("Zürich liegt in", "Österreich", "Zürich liegt in Österreich", " Österreich"),
        ("首都は", "東京 都", "首都は 東京 都", " 東京 都"),
        ("🙂", "🙃", "🙂 🙃", " 🙃"),
    ],
)
def test_one_space_stands_between_prompt_and_target(prompt: str, target: str, text: str, scored: str) -> None:
    """It is the target's, unless the prompt brings it."""
    tokenizer = byte_tokenizer()
    row = encode(tokenizer, prompt, target)
    assert tokenizer.decode(row.ids) == text
    assert tokenizer.decode(row.target_ids) == scored
    assert row.ids[row.target_start :] == row.target_ids


def test_a_token_that_reaches_into_the_target_is_its_first() -> None:
    # "Ġ" is a space: the space belongs to the target's first token, as in every byte-level vocabulary
    tokenizer = bpe([("Ġ", "J"), ("ĠJ", "a")])
    row = encode(tokenizer, "in", "Japan")
    assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["ĠJa", "p", "a", "n"]
    # a merge over the boundary, where no space stands between
    tokenizer = bpe([("x", "Ġ"), ("xĠ", "J")])
    row = encode(tokenizer, "x ", "Ja")
    assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["xĠJ", "a"]
    # and one that ends before the target
    tokenizer = bpe([("n", "Ġ")])
    row = encode(tokenizer, "in", "Japan")
    assert tokenizer.convert_ids_to_tokens(list(row.target_ids))[0] == "J"


@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_a_space_that_is_a_token_of_its_own_is_to_be_written(trimmed: bool, bos: bool) -> None:
    """Before numbers Llama 3, Qwen and SmolLM2 have one; released code and EasyEdit count it to the target."""
    tokenizer = bpe([("i", "s"), ("Ġ", "J"), ("Ġ", "i"), ("Ġi", "s")], bos)
    core = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False, use_regex=False)])
    if not bos:
        core.post_processor = processors.ByteLevel(trim_offsets=trimmed)  # trimmed, its characters are none
    for context in ("", "On J.\n"):
        row = encode(tokenizer, "J is", "19", context)
        assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["Ġ", "1", "9"]
        row = encode(tokenizer, "J is", "J1", context)
        assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["ĠJ", "1"]
    row = encode(tokenizer, "", "19")
    assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["1", "9"]


def test_the_same_ids_as_running_text() -> None:
    tokenizer = bpe([("Ġ", "J"), ("n", "Ġ"), ("a", "p")])
    for prompt, target in (("Lyon is in", "Japan"), ("a", "p"), ("n ", "n")):
        row = encode(tokenizer, prompt, target, context="On Jap.\n")
        assert list(row.ids) == tokenizer(tokenizer.decode(row.ids))["input_ids"]


@pytest.mark.parametrize("before", ["Lyon.\n", "Lyon is\n\n", "Lyon"])
@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_text_after_a_context_that_is_read_by_itself(before: str, scheme: str) -> None:
    """Its tokens are those of the whole text, without the space that such tokenizers put before a text."""
    tokenizer = marked(scheme)
    whole = encode(tokenizer, "Lyon is in", "Japan", context=before)
    row = encode(tokenizer, "Lyon is in", "Japan", after=before)
    assert encode(tokenizer, before).ids + row.ids == whole.ids
    assert row.target_ids == whole.target_ids
    assert tokenizer.convert_ids_to_tokens(list(row.target_ids)) == ["▁Japan"]
    assert encode(tokenizer, "", "Japan", after="\n").target_start == 0


@pytest.mark.parametrize("before", ["n", "n ", "n\n", "n\n\n"])
@pytest.mark.parametrize("text", ["in Japan", " in", "\nin", "\n\n in", "Öl", "🙂"])
def test_bytes_are_the_same_after_a_context(before: str, text: str) -> None:
    tokenizer = bpe([("n", "Ġ"), ("Ċ", "Ċ"), ("Ġ", "J"), ("ĊĊ", "Ċ")])
    assert encode(tokenizer, text, "Ja", after=before) == encode(tokenizer, text, "Ja")


@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_is_neither_lost_nor_gained_and_eos_never_added(bos: bool, eos: bool) -> None:
    tokenizer = bpe([("Ġ", "J")], bos, eos)
    assert adds_bos(tokenizer) is bos
    plain = encode(tokenizer, "in", "Japan", bos=False)
    assert tokenizer.bos_token_id not in plain.ids
    row = encode(tokenizer, "in", "Japan")
    assert row.ids == ((tokenizer.bos_token_id,) if bos else ()) + plain.ids
    assert row.target_ids == plain.target_ids
    assert tokenizer.eos_token_id not in row.ids


def test_a_tokenizer_that_has_a_bos_but_does_not_use_it() -> None:
    tokenizer = bpe([])  # as Qwen's and GPT-2's
    assert tokenizer.bos_token_id is not None
    assert not adds_bos(tokenizer)


def test_without_a_target_nothing_is_scored() -> None:
    row = encode(byte_tokenizer(), "Lyon")
    assert (len(row.ids), row.target_start, row.target_ids) == (4, 4, ())


def test_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to tokenise"):
        encode(byte_tokenizer(), "")
    assert encode(byte_tokenizer(), "", context="a").ids


def test_a_target_of_white_space_is_refused() -> None:
    with pytest.raises(ValueError, match="target"):
        encode(byte_tokenizer(), "Lyon", "  ")


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad(side: str) -> None:
    ids, mask = pad([[1, 2, 3], [4]], 9, side)
    expected = ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [1, 0, 0]])
    if side == "left":
        expected = ([[1, 2, 3], [9, 9, 4]], [[1, 1, 1], [0, 0, 1]])
    assert (ids.tolist(), mask.tolist()) == expected


def test_pad_id() -> None:
    tokenizer = bpe([])
    assert pad_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<s>"
    assert pad_id(tokenizer) == tokenizer.bos_token_id
    assert pad_id(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))) == 0


@pytest.mark.parametrize(
    ("prompt", "subject", "which", "until"),
    [
        ("Lyon is in", "Lyon", "last", "Lyon"),
        ("In Lyon, as in all of Lyon, one speaks", "Lyon", "last", "In Lyon, as in all of Lyon"),
        ("In Lyon, as in all of Lyon, one speaks", "Lyon", "first", "In Lyon"),
        ("The Lyonnais of Lyon and the Lyonnais", "Lyon", "last", "The Lyonnais of Lyon"),  # whole words first
        ("The Lyonnais eat", "Lyon", "last", "The Lyon"),
        ("Who is Zoë?", "Zoë", "last", "Who is Zoë"),
        ("首都は東京です", "東京", "last", "首都は東京"),
        ("C++ (language) is", "C++ (language)", "last", "C++ (language)"),
    ],
)
@pytest.mark.parametrize("context", ["", "Because of Lyon and. "])
@pytest.mark.parametrize("bos", [False, True])
def test_the_last_token_of_the_subject(prompt: str, subject: str, which: str, until: str, context: str, bos: bool):
    tokenizer = bpe([("L", "y"), ("Ly", "o"), ("Lyo", "n")], bos=bos)
    encoded, at = encode_subject(tokenizer, prompt, subject, "Peru", context, occurrence=which)  # type: ignore[arg-type]
    assert encoded == encode(tokenizer, prompt, "Peru", context)
    assert tokenizer.decode(encoded.ids[bos : at + 1]) == context + until


def test_a_token_that_reaches_over_the_subjects_end_is_its_last() -> None:
    tokenizer = bpe([("n", "Ġ"), ("nĠ", "i")])
    encoded, at = encode_subject(tokenizer, "Lyon is in", "Lyon", "Peru")
    assert tokenizer.decode(encoded.ids[: at + 1]) == "Lyon i"


@pytest.mark.parametrize("subject", ["Paris", "lyon", ""])
def test_a_subject_that_the_prompt_lacks(subject: str) -> None:
    with pytest.raises(ValueError, match="does not stand in the prompt 'Lyon is in'"):
        encode_subject(byte_tokenizer(), "Lyon is in", subject, context="Paris lyon. ")


@pytest.mark.parametrize("bos", [False, True])
def test_windows_of_running_text(bos: bool) -> None:
    tokenizer = bpe([], bos=bos)
    texts = ["abcde", "fg", "h" * 20]
    found = list(windows(tokenizer, texts, 6, 25))
    assert [len(w) for w in found] == [6, 6, 6, 6, 1]
    head = [tokenizer.bos_token_id] * bos
    assert all(list(w[:bos]) == head for w in found)
    running = tokenizer("\n\n".join(texts), add_special_tokens=False)["input_ids"]
    assert [i for w in found for i in w[bos:]] == list(running)[: 25 - 5 * bos]
    assert [len(w) for w in windows(tokenizer, ["abc"], 6, 25)] == [5 + bos]  # all there is


def test_windows_of_marked_words() -> None:
    (found,) = windows(marked(), ["Lyon is in", "Japan is in"], 100, 100)
    assert found == encode(marked(), "Lyon is in\n\nJapan is in\n\n").ids


def test_a_continuation_keeps_the_space_before_it() -> None:
    """A tokenizer of marked words, as SentencePiece's, takes the first word's mark for the beginning of a text."""
    names = ["<s>", "<unk>", "▁Paris", "▁is", "ian", "."]
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")
    assert tokenizer.decode([3]) == "is"
    assert continuation(tokenizer, [0, 2], [3, 5]) == " is."
    assert continuation(tokenizer, [0, 2], [4, 3]) == "ian is"
    assert continuation(tokenizer, [0], [2, 3]) == "Paris is"
    assert continuation(tokenizer, [0, 2], []) == continuation(tokenizer, [0, 2], [0]) == ""
    long = [0, *[2, 3] * 40]
    assert continuation(tokenizer, long, [2]) == " Paris"


def test_a_continuation_that_completes_a_character() -> None:
    euro = "€".encode()
    tokenizer = bpe([])
    ids = encode(tokenizer, "€").ids
    assert len(ids) == len(euro) == 3
    assert continuation(tokenizer, ids[:1], ids[1:]) == tokenizer.decode(list(ids[1:]))  # never more than is new
    assert continuation(tokenizer, encode(tokenizer, "5").ids, ids) == "€"
