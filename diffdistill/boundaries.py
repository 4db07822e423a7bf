"""Where in a text one author ends and another goes on, in characters (TESSY, arXiv:2604.14164).

A boundary predictor says of each token whether the next one is style or capability. What is here
reads its labels off annotated spans, and turns its predictions into a place to cut.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

Author: TypeAlias = Literal["student", "teacher", "template"]
"""Who wrote a part of a text; what opens and closes the thinking is the template's."""
WordRule: TypeAlias = Literal["discard", "extend", "exact"]
Offsets: TypeAlias = Sequence[tuple[int, int]]
"""The first character of each token, and the one after its last."""

IGNORED = -100
"""The label of a token that teaches nothing."""
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
    "\u2e80-\u2fdf\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"  # Chinese and Japanese
)
"""Letters of scripts without spaces between words, as in the brackets of a regular expression."""
WORDS = re.compile(rf"(?:[{UNSPACED}]|[^\s{UNSPACED}]+)\s*")
"""What is between spaces, and each letter of scripts without them; the space after it too."""


class Span(NamedTuple):
    """A part of a text by one author.

    Attributes:
        author: Who wrote it.
        start: Its first character.
        end: The character after its last.
    """

    author: Author
    start: int
    end: int


def style_tokens(offsets: Offsets, spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Return which tokens are style: those that begin in a span, or in which a span begins.

    The rule of TESSY's code; whether it is the paper's is unconfirmed.
    """
    return [
        any(start <= first < end or first <= start < last for start, end in spans)
        for first, last in offsets
    ]


def next_labels(styles: Sequence[bool]) -> list[int]:
    """Return for each token whether the next one is style, 1 or 0; of the last, ``IGNORED``."""
    return [*map(int, styles[1:]), IGNORED][: len(styles)]


def first_flip(
    offsets: Offsets, next_styles: Sequence[bool], start: int, style: bool
) -> int | None:
    """Return where the first token ends after which the other kind is to come; None if none does.

    The first token from ``start`` on is always accepted, so that there is progress whatever is
    predicted; what is predicted after the last token has no say.

    Args:
        offsets: Of the tokens of a text.
        next_styles: Whether the next token is style, as predicted at each token.
        start: The character from which on the text is new.
        style: Whether the author's own kind is style.
    """
    for index in range(1, len(offsets)):
        if offsets[index][0] > start and next_styles[index - 1] != style:
            end = offsets[index - 1][1]
            return end if end > start else offsets[index][0]
    return None


def in_one_word(left: str, right: str) -> bool:
    """Return whether two neighboring characters belong to the same word.

    A word is letters and digits; in scripts without spaces each letter is one. What is combined
    with a letter, such as an accent, belongs to it.
    """
    if _is_mark(right):
        return left.isalnum() or _is_mark(left)
    spelled = right.isalnum() and (left.isalnum() or _is_mark(left))
    return spelled and re.search(f"[{UNSPACED}]", left + right) is None


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _inside(text: str, place: int) -> bool:
    """Return whether a place in a text is within a word."""
    return 0 < place < len(text) and in_one_word(text[place - 1], text[place])


def word_cut(text: str, place: int, rule: WordRule) -> int:
    """Return where to cut a new text instead of ``place``, if that is within a word.

    Args:
        text: What an author wrote.
        place: A character of it, not the first.
        rule: ``discard`` leaves the word out that is cut (and the space before it, which belongs
            to the first token of the next author); if nothing else is left, and under ``extend``,
            it is kept to its end. ``exact`` cuts it.
    """
    if rule == "exact" or not _inside(text, place):
        return place
    start = end = place
    while _inside(text, start):
        start -= 1
    while _inside(text, end):
        end += 1
    start -= text[:start].endswith(" ")
    return start if rule == "discard" and start > 0 else end


def first_end(text: str, ends: Sequence[str], since: int) -> int | None:
    """Return where the first marker of an end begins, None if there is none.

    Args:
        text: The text.
        ends: The markers.
        since: The character from which on the text is new; a marker may have begun before.
    """
    places = (text.find(end, max(0, since - len(end) + 1)) for end in ends)
    return min((place for place in places if place >= 0), default=None)


def repeats(text: str, *, characters: int, words: int, times: int) -> bool:
    """Return whether the end of a text repeats a fragment of words.

    Args:
        text: The text.
        characters: How much of its end is looked at.
        words: Words of the fragment; a longer one repeats its parts as often.
        times: How often it has to be there.
    """
    found = text[-characters:].split()
    fragments = Counter(tuple(found[i : i + words]) for i in range(len(found) - words + 1))
    return any(count >= times for count in fragments.values())


def quoted_spans(text: str, quotes: Sequence[str]) -> list[tuple[int, int]]:
    """Return where a text has the quotes; each after the one before, or if not there anywhere.

    What is not in the text word for word is left out; a part of a word is not.
    """
    spans, since = [], 0
    for quote in quotes:
        place = _quoted(text, quote, since)
        if place is None:
            place = _quoted(text, quote, 0)
        if place is not None:
            since = place + len(quote)
            spans.append((place, since))
    return spans


def _quoted(text: str, quote: str, since: int) -> int | None:
    """Return where a text has a quote that neither begins nor ends within a word."""
    place = text.find(quote, since) if quote else -1
    while place >= 0:
        if not _inside(text, place) and not _inside(text, place + len(quote)):
            return place
        place = text.find(quote, place + 1)
    return None
