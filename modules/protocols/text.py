"""Reading answers out of generated text. Words are those of `modules.metrics.normalise`."""

from collections.abc import Sequence

from modules.editor import Edited
from modules.metrics import normalise


def first_line(text: str) -> str:
    """The first line that is not empty: what follows it is the next question, which base models go on to ask."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def within(words: Sequence[str], wanted: Sequence[str]) -> bool:
    """Whether `wanted`, which must not be empty, stands within `words`, one after another."""
    n = len(wanted)
    return bool(n) and any(list(words[at : at + n]) == list(wanted) for at in range(len(words) - n + 1))


def mentions(text: str, answers: Sequence[str]) -> bool:
    """Whether a text has one of the answers in it, in whole words."""
    words = normalise(text)
    return any(within(words, normalise(answer)) for answer in answers)


def generated(model: Edited, prompts: Sequence[str], max_new_tokens: int, batch_size: int) -> dict[str, str]:
    """Greedy continuations by prompt, each prompt once."""
    distinct = list(dict.fromkeys(prompts))
    texts = model.generate(distinct, max_new_tokens=max_new_tokens, batch_size=batch_size) if distinct else []
    return dict(zip(distinct, texts, strict=True))
