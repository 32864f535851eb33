"""Text as the words by which a subject is recognised in it.

Two texts are the same where their words are. Unicode's compatible forms (NFKC) and invisible characters make no
difference, nor do white space, the shape of a dash or a quote, and a hyphen inside a word. Punctuation counts as a word
of its own, so that "AC/DC" and "2001: A Space Odyssey" are found as they are written and "Paris Texas" is not found in
"Not Paris. Texas". Diacritics count: "Curacao" is another word than "Curaçao"; aliases serve for that.

A word is a run of letters and digits. Scripts that put no space between words have none to go by: there each character
is a word (with its vowel signs), but a run of katakana is one, since it mostly is a name.
"""

import unicodedata
from functools import cache

_UNSPACED = {"CJK", "IDEOGRAPHIC", "HIRAGANA", "HANGUL", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI"}
_SHAPES = str.maketrans(dict.fromkeys("‘’‚‛ʻʼ′`´", "'") | dict.fromkeys("“”„‟«»″", '"'))


def words(text: str) -> list[str]:
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
        joins = last in _WORDS if kind == "mark" else kind == last and kind in ("letters", "katakana")
        if joins:
            found[-1] += character
        elif kind != "space":
            found.append(character)
        last = last if kind == "mark" else kind
    return found


def folded(word: str) -> str:
    """A word without its case."""
    return word.lower() if word.isascii() else unicodedata.normalize("NFKC", word.casefold())


_WORDS = ("letters", "katakana", "alone")


@cache
def _kind(character: str) -> str:
    """letters and katakana: joined with their like; alone: a word by itself; mark: part of the character before it."""
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
