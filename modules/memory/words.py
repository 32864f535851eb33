"""Text as the words by which a subject is recognised in it.

Unicode's compatible forms (NFKC) and invisible characters make no difference, nor do white space, the shape of a dash
or a quote, and a hyphen inside a word. Any other mark counts as a word of its own, so that "AC/DC" and "2001: A Space
Odyssey" are found as they are written, and "Paris Texas" is not found in "Not Paris. Texas". Diacritics count:
"Curacao" is not "Curaçao"; aliases serve for that.

A word is a run of letters and digits; 5.1 and 10,000 are one. Scripts that put no space between words give none to go
by: there each character is a word, with its vowel signs (so 京都 is found in 東京都, wrongly), but a run of katakana is
one word.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache

Words = tuple[str, ...]

_UNSPACED = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI"}
_SHAPES = str.maketrans(dict.fromkeys("‘’‚‛ʻʼ′`´", "'") | dict.fromkeys("“”„‟«»″", '"'))
_RUNS = ("letters", "katakana")
_WORDS = (*_RUNS, "alone")


def words(text: str) -> Words:
    """The words of a text, their case as it is."""
    text = unicodedata.normalize("NFKC", text.translate(_SHAPES))
    found: list[str] = []
    last = "space"
    for at, character in enumerate(text):
        kind = _kind(character)
        if kind == "ignored":
            continue
        if kind == "dash":
            inside = last in _WORDS and _kind(text[at + 1 : at + 2]) in _WORDS
            kind, character = ("space", "") if inside else ("sign", "-")
        if character in ".," and found and last == "letters":
            digits = found[-1][-1].isdigit() and text[at + 1 : at + 2].isdigit()
            kind = "letters" if digits else kind  # iOS 5 is not found in iOS 5.1
        joins = last in _WORDS if kind == "mark" else kind == last and kind in _RUNS
        if joins:
            found[-1] += character
        elif kind != "space":
            found.append(character)
        last = last if kind == "mark" else kind
    return tuple(found)


def fold(text: Sequence[str]) -> Words:
    """Words without their case."""
    return tuple(w.lower() if w.isascii() else unicodedata.normalize("NFKC", w.casefold()) for w in text)


@cache
def _kind(character: str) -> str:
    """letters and katakana: joined with their like; alone: a word by itself; mark: part of what it stands on."""
    category = unicodedata.category(character) if character else "Zs"
    if category == "Cf":
        return "ignored"
    if category[0] in "ZC":
        return "space"
    if category[0] == "M":
        return "mark"
    if category == "Pd":
        return "dash"
    if category[0] in "LN":
        script = unicodedata.name(character, "").split(" ")[0]
        if script.startswith("KATAKANA"):
            return "katakana"
        return "alone" if script in _UNSPACED else "letters"
    return "letters" if character in "+#" else "sign"  # C, C++ and C# are three subjects
