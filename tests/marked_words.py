"""A tokenizer of marked words, made in code."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def marked(scheme: str = "first") -> PreTrainedTokenizerBase:
    """Marked words, as SentencePiece's, with bytes for what is none; Llama 2's tokenizer puts a space before a text."""
    words = ["▁Lyon", "Lyon", "▁is", "▁in", "▁Japan", "Japan", "▁", "<0x0A>", *"Lyonisnap."]
    core = Tokenizer(
        models.Unigram([("<unk>", 0.0), *((w, -float(4 - len(w))) for w in dict.fromkeys(words))], 0, True)
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Metaspace()])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
