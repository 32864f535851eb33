"""DUNE's answer rules: what a generated text answers to a question of each set, and whether that is the published one.

Source: Akyürek et al. 2023, DUnE, and its released evaluation. All rules read the first line only, because a base model
goes on to ask itself the next question. What differs from the released code is said at each rule.
"""

import re
from collections.abc import Callable, Hashable

from datamodules.readers.dune import choices
from datamodules.records import Query
from modules.metrics import normalise
from modules.protocols.text import first_line, within

_NUMBER = re.compile(r"(?<![\w.])-?\d[\d,]*(?:\.\d+)?")
_ALONE = re.compile(r"(?<![\w'’])([A-Z1-9])(?![\w'’])")
_OPENING = re.compile(r"\(?([A-Za-z1-9])(?:[.):,]|$)|([A-Z1-9])(?=\s)")
_ANNOUNCED = re.compile(r"\b(?:answer|choice|option)\b(?:\s+is)?\s*:?\s*\(?([A-Za-z1-9])(?![\w'’])", re.IGNORECASE)
_VERDICTS = ("yes", "no", "maybe", "true", "false", "neither")
# a comma before one of these, or before "the woman and", is within a list; one within a number ends nothing either
_LISTED = r"(?:and|or|nor|both|either|neither|yes|no|maybe|true|false)\b"
_LISTS_ON = rf"\s*(?:{_LISTED}|(?:the|an?)(?: \w+){{1,2}},? (?:and|or|nor)\b)"
_END = re.compile(rf"\bbecause\b|[.;](?!\w)|[,(](?!\d|{_LISTS_ON})", re.IGNORECASE)
_LEAD = re.compile(r"^(?:yes|well|in|on|at|from|for|if|as|since|given|based|according|\w+ly)\b[^,.;]*,", re.IGNORECASE)
_UNDECIDED = {"and", "or", "both", "neither", "either", "nor"}
_SAME = {"male": "man", "men": "man", "female": "woman", "women": "woman"}


def letter(text: str, question: str = "") -> str | None:
    """The choice that a text names: the letter it opens with, or announces ("the answer is B"), or else the first
    capital that stands alone; an "A" before a word in lower case is an article. None without one.

    The released code takes B, C, D and A in this order of preference, also from within words.

    Args:
        question: whose choices are the letters that count; A to D where none can be found.
    """
    offered = set(choices(question)) or set("ABCD")
    line = first_line(text)
    found = _OPENING.match(line)
    if found and (found[1] or found[2]).upper() in offered:
        return (found[1] or found[2]).upper()
    found = _ANNOUNCED.search(line)
    if found and found[1].upper() in offered and not _article(line, found.end(1), found[1].upper()):
        return found[1].upper()
    alone = [m[1] for m in _ALONE.finditer(line) if m[1] in offered and not _article(line, m.end(), m[1])]
    return alone[0] if alone else None


def _article(line: str, end: int, letter: str) -> bool:
    return letter == "A" and re.match(r"\s+[a-z]", line[end:]) is not None


def number(text: str) -> float | None:
    """The last number of a text, without thousands' commas; None without one.

    The released code takes the last run of digits, which loses signs and what stands before a decimal point.
    """
    found = _NUMBER.findall(first_line(text))
    return float(found[-1].replace(",", "")) if found else None


def verdict(text: str) -> str | None:
    """Yes, no, maybe, true, false or neither, where a text's statement says just one of these; else None.

    The released code looks for these words in the reasons too, where "Yes, because there is no ..." says two.
    """
    said = {word for word in normalise(_statement(first_line(text))) if word in _VERDICTS}
    return said.pop() if len(said) == 1 else None


def names(text: str, answer: str) -> bool:
    """Whether a text names what the answer names.

    Of both the statement counts, without the reasons behind it; of the text also what follows an opening such as "In
    this case,". Compared are words without articles, where male and female are man and woman and African American is
    Black. Of an answer of two words ("The Muslim man") the first is enough. The text has to have these words one after
    another, or be how the answer begins. A text that names several things (and, both, or, neither, ...) names none,
    unless the answer has that word itself.

    The released code takes any word in common, also of the reasons, drops the last word of longer answers too, and
    finds "and" anywhere, within words as well.
    """
    line, wanted = first_line(text), _words(_statement(first_line(answer).partition("(")[0]))
    return any(_named(_words(_statement(part)), wanted) for part in (line, _LEAD.sub("", line)))


def _named(said: list[str], wanted: list[str]) -> bool:
    if not said or not wanted or _UNDECIDED & (set(said) - set(wanted)):
        return False
    return within(said, wanted[:1] if len(wanted) == 2 else wanted) or wanted[: len(said)] == said


def _statement(line: str) -> str:
    """A line up to its first "because", full stop, semicolon, bracket or comma, but not within a list of things."""
    line = re.sub(r"^\W+", "", line)
    end = _END.search(line, 1)
    return line[: end.start()] if end else line


def _words(text: str) -> list[str]:
    plain = re.sub(r"african[ -]american", "black", text, flags=re.IGNORECASE)
    return [_SAME.get(word, word) for word in normalise(plain)]


def gives(kind: str, text: str, query: Query) -> bool:
    """Whether a text gives the published answer, by the rule of a set."""
    published = query.answers[-1]  # of a question with choices the letter, behind the line
    if kind in ("new_info", "scientific"):
        return letter(text, query.prompt) == published.upper()
    if kind == "arithmetic":
        return number(text) is not None and number(text) == number(published)
    wanted = verdict(published) if kind == "debiasing_II" else None
    return verdict(text) == wanted if wanted else names(text, published)


def reading(kind: str, text: str, query: Query) -> Hashable:
    """What a text answers, so that two texts agree where this is the same; its words where no rule finds an answer."""
    rules: dict[str, Callable[[str], Hashable]] = {
        "new_info": lambda said: letter(said, query.prompt),
        "scientific": lambda said: letter(said, query.prompt),
        "arithmetic": number,
        "debiasing_II": verdict,
    }
    found = rules[kind](text) if kind in rules else None
    return tuple(_words(first_line(text))) if found is None else found
