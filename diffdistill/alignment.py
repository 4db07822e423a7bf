"""Which tokens of two tokenizers spell the same bytes.

Characters are not enough: byte-level tokenizers split one character over several tokens. So both
sides are compared in the bytes that their tokens spell (TRL's GOLD and tokenkit do likewise).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, TypeAlias

from diffdistill.errors import UserError

Span: TypeAlias = tuple[int, int]
"""Where something begins, and where it has ended."""


class Spelling(NamedTuple):
    """A text and the tokens that spell it.

    Attributes:
        text: The text in UTF-8.
        tokens: The id of each token.
        spans: The bytes of ``text`` that each token spells; in order and without gaps.
        special: Whether each token is a marker; markers are never aligned.
    """

    text: bytes
    tokens: tuple[int, ...]
    spans: tuple[Span, ...]
    special: tuple[bool, ...]


class Chunk(NamedTuple):
    """The tokens of either side that spell the same bytes.

    Attributes:
        student: The student's tokens, from one index up to another.
        teacher: The teacher's.
    """

    student: Span
    teacher: Span


def common_chunks(
    student: Spelling, teacher: Spelling, where: tuple[Span, Span] | None = None
) -> list[Chunk]:
    """Return the smallest runs of tokens that spell the same bytes on both sides, in order.

    Tokens that reach out of the range, and all after the last common boundary (one side may be
    cut short), belong to no chunk. Nor do runs that hold a special token.

    Args:
        student: The text as the student's tokenizer spells it.
        teacher: The text as the teacher's tokenizer spells it.
        where: The bytes to align, in the student's text and in the teacher's; None is all.

    Raises:
        UserError: If the bytes differ, or the tokens of a side leave a gap.
    """
    here, there = where or ((0, len(student.text)), (0, len(teacher.text)))
    _check_same(student.text[slice(*here)], teacher.text[slice(*there)], here[0], there[0])
    first, second = _cuts(student, here, "student"), _cuts(teacher, there, "teacher")
    chunks = []
    for start, stop in pairwise(sorted(first.keys() & second.keys())):
        chunk = Chunk(
            (first[start][1], first[stop][0]),
            (second[start][1], second[stop][0]),
        )
        if not _holds_special(student, chunk.student) and not _holds_special(
            teacher, chunk.teacher
        ):
            chunks.append(chunk)
    return chunks


def align(
    student: Spelling, teacher: Spelling, where: Sequence[tuple[Span, Span]] | None = None
) -> tuple[list[int], list[int]]:
    """Return the chunk of each token of the student and of the teacher, -1 where it has none.

    Both sides count the same chunks, from 0, in order.

    Args:
        student: The text as the student's tokenizer spells it.
        teacher: The text as the teacher's tokenizer spells it.
        where: Pairs of byte ranges to align (the answers of a chat, so that no prompt is in a
            chunk); None is the whole text.
    """
    ids = [-1] * len(student.tokens), [-1] * len(teacher.tokens)
    ranges = [None] if where is None else where
    chunks = [chunk for pair in ranges for chunk in common_chunks(student, teacher, pair)]
    for number, chunk in enumerate(chunks):
        for side, (start, stop) in zip(ids, chunk, strict=True):
            side[start:stop] = [number] * (stop - start)
    return ids


def inside(spelling: Spelling, where: Span) -> Span:
    """Return the tokens, from one index up to another, that lie wholly in a range of bytes.

    The range is empty where there is none.
    """
    chosen = [
        index
        for index, (start, stop) in enumerate(spelling.spans)
        if where[0] <= start < stop <= where[1]
    ]
    return (chosen[0], chosen[-1] + 1) if chosen else (0, 0)


def _cuts(spelling: Spelling, where: Span, side: str) -> dict[int, Span]:
    """Return for each boundary of tokens in a range: the end of the one before, the next's index.

    Boundaries are counted from the start of the range.
    """
    first, last = inside(spelling, where)
    cuts: dict[int, Span] = {}
    before = None
    for index in range(first, last):
        start, stop = spelling.spans[index]
        if start == stop:
            continue
        if before is not None and start != before:
            raise UserError(
                f"the {side}'s tokens do not spell bytes {before} to {start} of "
                f"{_excerpt(spelling.text, min(before, start))}; the tokenizer changes the text"
            )
        end = cuts[start - where[0]][0] if before is not None else index
        cuts[start - where[0]] = (end, index)
        cuts[stop - where[0]] = (index + 1, index + 1)
        before = stop
    return cuts


def _holds_special(spelling: Spelling, tokens: Span) -> bool:
    return any(spelling.special[slice(*tokens)])


def _check_same(student: bytes, teacher: bytes, here: int, there: int) -> None:
    if student == teacher:
        return
    pairs = zip(student, teacher, strict=False)
    shorter = min(len(student), len(teacher))
    position = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
    raise UserError(
        f"the two sides spell different texts: at byte {here + position} of "
        f"{len(student)} bytes the student has {_excerpt(student, position)}, at byte "
        f"{there + position} of {len(teacher)} bytes the teacher has "
        f"{_excerpt(teacher, position)}; look for a normalizer or a prefix space"
    )


def _excerpt(text: bytes, position: int) -> str:
    """Return some of a text from a position on, quoted."""
    while position > 0 and position < len(text) and text[position] & 0xC0 == 0x80:
        position -= 1
    return repr(text[position : position + 24].decode(errors="replace"))
