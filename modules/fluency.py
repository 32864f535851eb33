"""Fluency and consistency of free text, as ROME defines them (Meng et al. 2022, arXiv 2202.05262, section 3.4).

Fluency falls where an edited model repeats itself. Consistency asks whether what it writes about an edited subject
reads like texts about things that have the new attribute.

What differs from the released code: words are split by one regular expression, not by NLTK, whose model would have to
be downloaded; texts are greedy continuations, because an `Edited` does not sample, where the released code draws each
token among the five most probable. Greedy texts repeat themselves sooner, so figures are lower than published ones, and
are to be compared with the unedited model's own.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from datamodules.records import EditRecord
from datamodules.tokens import encode
from modules.editor import Edited

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

FLUENCY, CONSISTENCY = "fluency/ngram_entropy", "consistency/tfidf_cosine"  # ROME's GE and RS
FLUENCY_PROTOCOLS: dict[str, str] = {
    FLUENCY: "Entropy in bits of the bigrams (weight 1/3) and trigrams (weight 2/3) of prompt and "
    "greedy continuation, up to 100 tokens, mean over a record's generation prompts (ROME, greedy instead of top-5 "
    "sampling).",
    CONSISTENCY: "Cosine of the TF-IDF vectors of a record's generated texts and of its reference "
    "texts, each joined to one (ROME, greedy instead of top-5 sampling).",
}
_WEIGHTS = {2: 1 / 3, 3: 2 / 3}  # the released code's mean of 2/3 and 4/3 of them
_WORD = re.compile(r"\w+(?:['’.,-]\w+)*|[^\w\s]")


@dataclass(frozen=True)
class Written:
    """What a model wrote for one record, and how it is judged.

    Attributes:
        texts: prompts with their continuations.
        fluency: `fluency/ngram_entropy`, in bits; published tables show a hundred times as much.
        consistency: `consistency/tfidf_cosine`; None without reference texts.
    """

    texts: tuple[str, ...]
    fluency: float
    consistency: float | None

    @property
    def values(self) -> dict[str, float]:
        """Metric -> value, for `modules.metrics.summarise`."""
        found = {FLUENCY: self.fluency, CONSISTENCY: self.consistency}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class References:
    """Texts about subjects that have an attribute (ROME's attribute_snippets.json).

    Args:
        texts: by (relation id, target id); see `datamodules.readers.counterfact.read_snippets`.
    """

    texts: Mapping[tuple[str, str], tuple[str, ...]]

    def of(self, record: EditRecord) -> tuple[str, ...]:
        """The texts about the new attribute of a record's edit; none where the record or the file does not name it."""
        return self.texts.get((record.domain or "", record.target_id or ""), ())

    @cached_property
    def vectorizer(self) -> "TfidfVectorizer":
        """TF-IDF weights of all texts, whatever their attribute, as in ROME."""
        return tfidf([text for some in self.texts.values() for text in some])


def words(text: str) -> list[str]:
    """Words and punctuation marks, in their own case."""
    return _WORD.findall(text)


def ngram_entropy(text: str, n: int) -> float:
    """Entropy in bits of the distribution of a text's n-grams of words; 0 for a text without any."""
    found = words(text)
    counts = Counter(zip(*(found[i:] for i in range(n)), strict=False))
    total = sum(counts.values())
    return -sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0


def fluency(text: str) -> float:
    """Weighted mean of bigram and trigram entropy in bits (ROME's GE): what repeats itself is low."""
    return sum(weight * ngram_entropy(text, n) for n, weight in _WEIGHTS.items())


def tfidf(corpus: Sequence[str]) -> "TfidfVectorizer":
    """TF-IDF weights of a corpus, scikit-learn's defaults (ROME: all texts about any attribute).

    Raises:
        ValueError: for a corpus without words.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second, and few need it

    return TfidfVectorizer().fit(corpus)


def consistency(texts: Sequence[str], references: Sequence[str], vectorizer: "TfidfVectorizer") -> float:
    """Cosine of the TF-IDF vectors of texts and references, each joined to one (ROME's RS).

    0 where either has no word that the vectorizer knows.
    """
    rows = np.asarray(vectorizer.transform([" ".join(texts), " ".join(references)]).todense())
    norms = np.linalg.norm(rows, axis=1)
    return float(rows[0] @ rows[1] / norms.prod()) if norms.all() else 0.0


def written(
    edited: Edited,
    prompts: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]] | None = None,
    vectorizer: "TfidfVectorizer | None" = None,
    max_tokens: int = 100,
    batch_size: int = 32,
) -> list[Written]:
    """Let a model write on each record's generation prompts, and judge the texts.

    Args:
        prompts: of each record; all records are asked in one call. One that is there several times weighs as much.
        references: of each record, texts about subjects that have the edited attribute; one without any gets no
            consistency.
        vectorizer: see `tfidf`; by default one of all references.
        max_tokens: of prompt and continuation together.

    Raises:
        ValueError: for a record without prompts, references for another number of records, or a prompt that leaves no
            room in `max_tokens`.
    """
    references = [()] * len(prompts) if references is None else references
    if len(references) != len(prompts) or not all(prompts):
        raise ValueError(f"needs prompts for each of {len(prompts)} records, and references for each or for none")
    tokenizer = edited.backbone.tokenizer
    flat = list(dict.fromkeys(prompt for some in prompts for prompt in some))  # greedy: the same text again
    lengths = [len(encode(tokenizer, prompt).ids) for prompt in flat]
    if flat and max(lengths) >= max_tokens:
        longest = flat[lengths.index(max(lengths))]
        raise ValueError(f"the prompt {longest!r} is {max(lengths)} tokens long, max_tokens is {max_tokens}")
    new = max_tokens - min(lengths, default=0)
    continued = edited.generate(flat, max_new_tokens=new, batch_size=batch_size) if flat else []
    texts = {p: _cut(edited, p, more, max_tokens) for p, more in zip(flat, continued, strict=True)}
    if vectorizer is None and any(references):
        vectorizer = tfidf([text for some in references for text in some])
    found = []
    for some, known in zip(prompts, references, strict=True):
        own = tuple(texts[prompt] for prompt in some)
        alike = consistency(own, known, vectorizer) if known and vectorizer is not None else None
        found.append(Written(own, sum(map(fluency, own)) / len(own), alike))
    return found


def _cut(edited: Edited, prompt: str, continuation: str, max_tokens: int) -> str:
    """Prompt and continuation; every text gets so many tokens, however long its prompt."""
    tokenizer = edited.backbone.tokenizer
    text = prompt + continuation
    ids = encode(tokenizer, text).ids
    return text if len(ids) <= max_tokens else str(tokenizer.decode(list(ids[:max_tokens]), skip_special_tokens=True))
