import itertools
import random

import pytest

from diffdistill.alignment import Chunk, Spelling, align, common_chunks, inside
from diffdistill.errors import UserError

WORDS = [
    "the",
    "  ",
    " \t\n",
    "é",
    "e\u0301",
    "漢字",
    "🙂",
    "👩‍👩‍👧",
    "0",
    "\u200b",
    "x = 1",
    "ß",
    "\U0001f1e9\U0001f1ea",
    "\u200f\u0639",
    "_",
]


def spelling(text: str, cuts: list[int], special: tuple[int, ...] = ()) -> Spelling:
    """Return a text cut into tokens at some bytes."""
    data = text.encode()
    spans = tuple(itertools.pairwise([0, *cuts, len(data)])) if data else ()
    numbers = tuple(range(len(spans)))
    return Spelling(data, numbers, spans, tuple(n in special for n in numbers))


def random_text(rng: random.Random) -> str:
    return "".join(
        rng.choice(WORDS) if rng.random() < 0.7 else chr(rng.randrange(0x20, 0x3000))
        for _ in range(rng.randrange(1, 12))
    )


def random_cuts(rng: random.Random, size: int) -> list[int]:
    share = rng.random()
    return [at for at in range(1, size) if rng.random() < share]


def spelled(side: Spelling, tokens: tuple[int, int]) -> bytes:
    return b"".join(side.text[slice(*span)] for span in side.spans[slice(*tokens)])


def brute_force(student: Spelling, teacher: Spelling) -> list[Chunk]:
    """Grow both sides token by token, comparing what they have spelled from the start."""
    pairs = [
        (i, j)
        for i in range(len(student.tokens) + 1)
        for j in range(len(teacher.tokens) + 1)
        if spelled(student, (0, i)) == spelled(teacher, (0, j))
    ]
    return [Chunk((a, c), (b, d)) for (a, b), (c, d) in itertools.pairwise(pairs)]


def test_chunks_of_random_texts_partition_both_sides_and_are_the_smallest() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = random_text(rng)
        size = len(text.encode())
        first, second = (spelling(text, random_cuts(rng, size)) for _ in range(2))
        chunks = common_chunks(first, second)
        assert chunks == brute_force(first, second)
        for side, ranges in (
            (first, [c.student for c in chunks]),
            (second, [c[1] for c in chunks]),
        ):
            flat = [index for start, stop in ranges for index in range(start, stop)]
            assert flat == list(range(len(side.tokens)))
            assert all(start < stop for start, stop in ranges)
        assert all(spelled(first, c.student) == spelled(second, c.teacher) for c in chunks)


def test_the_same_tokens_on_both_sides_are_paired_one_to_one() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = random_text(rng)
        side = spelling(text, random_cuts(rng, len(text.encode())))
        student, teacher = align(side, side)
        assert student == teacher == list(range(len(side.tokens)))


def test_swapping_the_sides_swaps_the_chunks() -> None:
    rng = random.Random(2)
    for _ in range(500):
        text = random_text(rng)
        first, second = (spelling(text, random_cuts(rng, len(text.encode()))) for _ in range(2))
        swapped = [Chunk(c.teacher, c.student) for c in common_chunks(second, first)]
        assert swapped == common_chunks(first, second)


def test_bytes_of_one_character_over_several_tokens_are_one_chunk() -> None:
    whole, bytewise = spelling("a🙂b", [1, 5]), spelling("a🙂b", [1, 2, 3, 4, 5])
    assert align(whole, bytewise) == ([0, 1, 2], [0, 1, 1, 1, 1, 2])


def test_an_empty_text_has_no_chunks() -> None:
    assert align(spelling("", []), spelling("", [])) == ([], [])


def test_tokens_that_reach_out_of_the_range_belong_to_no_chunk() -> None:
    student = spelling("Q: yes\n", [3, 6])  # 'Q: ' 'yes' '\n'
    teacher = spelling("[yes]", [2, 3])  # '[y' 'e' 's]'
    assert align(student, teacher, [((3, 6), (1, 4))]) == ([-1, -1, -1], [-1, -1, -1])
    finer = spelling("Q: yes\n", [2, 4, 5, 6])  # 'Q:' ' y' 'e' 's' '\n'
    assert align(finer, teacher, [((3, 6), (1, 4))]) == ([-1, -1, 0, -1, -1], [-1, 0, -1])


def test_ranges_are_counted_on_in_order() -> None:
    student, teacher = spelling("yes.yes", [3, 4]), spelling("yes||yes", [1, 3, 5])
    where = [((0, 3), (0, 3)), ((4, 7), (5, 8))]
    assert align(student, teacher, where) == ([0, -1, 1], [0, 0, -1, 1])


def test_a_side_that_is_cut_short_is_aligned_as_far_as_it_goes() -> None:
    whole = spelling("abcdef", [2, 4])
    short = spelling("abcdef", [1, 2, 3])
    cut = short._replace(tokens=(0, 1, 2), spans=short.spans[:3], special=(False,) * 3)
    assert align(whole, cut) == ([0, -1, -1], [0, 0, -1])


def test_special_tokens_are_never_aligned_and_take_their_chunk_along() -> None:
    student = spelling("ab<s>c", [2, 5], special=(1,))
    assert align(student, spelling("ab<s>c", [2, 4, 5])) == ([0, -1, 1], [0, -1, -1, 1])
    assert align(student, spelling("ab<s>c", [1, 3, 5])) == ([-1, -1, 0], [-1, -1, -1, 0])


def test_special_tokens_without_bytes_are_passed_over() -> None:
    spans = ((0, 0), (0, 2), (2, 2), (2, 4), (4, 4))
    marked = Spelling(b"abcd", tuple(range(5)), spans, (True, False, True, False, True))
    assert align(marked, spelling("abcd", [2])) == ([-1, 0, -1, 1, -1], [0, 1])
    assert align(marked, spelling("abcd", [])) == ([-1] * 5, [-1])


def test_texts_that_differ_are_refused_with_the_place_and_both_spellings() -> None:
    with pytest.raises(UserError) as caught:
        align(spelling("caf\u00e9 au", [3]), spelling("cafe\u0301 au", [3]))
    message = str(caught.value)
    assert "byte 3" in message
    assert "'\u00e9 au'" in message
    assert "'e\u0301 au'" in message
    assert "8 bytes" in message
    assert "9 bytes" in message
    assert "\n" not in message


def test_a_text_that_goes_on_is_refused_at_the_end_of_the_shorter() -> None:
    with pytest.raises(UserError, match=r"at byte 2 of 2 bytes the student has ''.*'c'"):
        align(spelling("ab", []), spelling("abc", []))


def test_tokens_with_a_gap_are_refused() -> None:
    gap = Spelling(b"a b", (0, 1), ((0, 1), (2, 3)), (False, False))
    with pytest.raises(UserError, match="teacher's tokens do not spell bytes 1 to 2 of ' b'"):
        align(spelling("a b", [1]), gap)


def test_inside_takes_whole_tokens_only() -> None:
    side = spelling("abcdef", [2, 4])
    assert inside(side, (0, 6)) == (0, 3)
    assert inside(side, (1, 5)) == (1, 2)
    assert inside(side, (3, 4)) == (0, 0)
