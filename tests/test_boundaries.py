"""Places where one author ends and another goes on."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffdistill.boundaries import (
    IGNORED,
    first_end,
    first_flip,
    in_one_word,
    next_labels,
    quoted_spans,
    repeats,
    style_tokens,
    word_cut,
)


def tokens_of(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in re.finditer(r" ?\S+|\s", text)]


def test_a_token_is_style_if_it_begins_in_a_span_or_a_span_begins_in_it() -> None:
    offsets = [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert style_tokens(offsets, [(3, 6)]) == [False, True, False, False]
    assert style_tokens(offsets, [(5, 7)]) == [False, True, True, False]
    assert style_tokens(offsets, [(2, 3), (11, 40)]) == [True, False, False, True]
    assert style_tokens(offsets, []) == [False] * 4


def test_a_label_is_the_kind_of_the_next_token_and_the_last_teaches_nothing() -> None:
    assert next_labels([True, False, True]) == [0, 1, IGNORED]
    assert next_labels([True]) == [IGNORED]
    assert next_labels([]) == []


def test_a_text_is_cut_at_the_end_of_the_token_before_the_other_kind() -> None:
    text = "so 12 and 13"
    offsets = tokens_of(text)
    styles = [any(c.isalpha() for c in text[a:b]) for a, b in offsets]
    perfect = [*styles[1:], True]
    assert text[: first_flip(offsets, perfect, 0, style=True) or 0] == "so"
    assert first_flip(offsets, perfect, 0, style=False) is not None
    later = first_flip(offsets, perfect, len("so"), style=False)
    assert text[:later] == "so 12"
    assert first_flip(offsets, [True] * 4, 0, style=True) is None


def test_the_first_new_token_is_accepted_whatever_is_predicted() -> None:
    offsets = tokens_of("so 12 and 13")
    for start in (0, 2, 5):
        for style, said in ((True, False), (False, True)):
            cut = first_flip(offsets, [said] * 4, start, style)
            assert cut is not None
            assert cut > start
    assert first_flip(offsets, [False] * 4, 9, style=True) is None  # nothing after the only token


def test_what_is_predicted_at_the_last_token_has_no_say() -> None:
    offsets = tokens_of("one two three")
    assert first_flip(offsets, [True, True, False], 0, style=True) is None


def test_a_gap_between_tokens_does_not_make_an_empty_text() -> None:
    assert first_flip([(0, 2), (3, 5)], [False, False], 2, style=True) == 3


@pytest.mark.parametrize(
    ("rule", "kept"),
    [("exact", "so the ans"), ("discard", "so the"), ("extend", "so the answer")],
)
def test_a_word_that_is_cut_is_left_out_or_kept_whole(rule: str, kept: str) -> None:
    text = "so the answer is"
    assert text[: word_cut(text, 10, rule)] == kept  # type: ignore[arg-type]
    assert word_cut(text, 6, rule) == 6  # type: ignore[arg-type]
    assert word_cut(text, len(text), rule) == len(text)  # type: ignore[arg-type]


def test_of_a_single_word_nothing_is_discarded() -> None:
    assert word_cut("answer is", 3, "discard") == 6
    assert word_cut("answer", 3, "discard") == 6
    assert word_cut("line\nans", 6, "discard") == 5


def test_a_word_ends_where_letters_and_digits_do() -> None:
    assert word_cut("x=12", 2, "discard") == 2
    assert word_cut("is x=124", 7, "discard") == 5
    assert word_cut("f(abc)", 3, "extend") == 5
    assert word_cut("caf\u00e9s, yes", 3, "extend") == 5
    assert word_cut("so cafe\u0301 yes", 7, "extend") == 8  # an accent belongs to its letter


def test_each_letter_of_a_script_without_spaces_is_a_word() -> None:
    for text in ("\u6240\u4ee5\u7b54\u6848", "\u305f\u3060\u3057", "\u0e15\u0e01\u0e25"):
        for rule in ("discard", "extend"):
            assert [word_cut(text, place, rule) for place in (1, 2)] == [1, 2]  # type: ignore[arg-type]
    mixed = "\u6240\u4ee5abc\u7b54"
    assert word_cut(mixed, 4, "discard") == 2
    assert word_cut(mixed, 4, "extend") == 5


@given(st.text("ab1 \n.\u00e9\u0301\u4e2d", min_size=2, max_size=12), st.integers(1, 11))
def test_a_cut_is_progress_and_never_within_a_word_unless_exact(text: str, place: int) -> None:
    place = min(place, len(text))
    for rule in ("discard", "extend"):
        cut = word_cut(text, place, rule)  # type: ignore[arg-type]
        assert 0 < cut <= len(text)
        assert cut == len(text) or not in_one_word(text[cut - 1], text[cut])
        word = text[min(cut, place) : max(cut, place)]
        assert not word.strip("ab1\u00e9\u0301\u4e2d ")
        assert cut >= place or rule == "discard"
    assert word_cut(text, place, "exact") == place


def test_the_first_marker_ends_also_one_that_began_before() -> None:
    text = "it is 7.</think>so"
    assert first_end(text, ["</think>", "final"], 0) == 8
    assert first_end(text, ["</think>"], 12) == 8
    assert first_end(text, ["</think>"], 16) is None
    assert first_end("b end a", ["a", "end"], 0) == 2
    assert first_end("nothing", [], 0) is None


def test_a_fragment_that_is_there_often_enough_repeats() -> None:
    how = {"characters": 1000, "words": 3, "times": 8}
    assert repeats("wait a moment " * 8, **how)
    assert not repeats("wait a moment " * 7, **how)
    assert not repeats("wait " * 7, **how)
    assert not repeats("wait a moment " * 8 + "x " * 3 + "y" * 1000, **how)
    assert not repeats(" ".join(map(str, range(400))), **how)
    assert not repeats("", **how)


def test_quotes_are_found_one_after_the_other() -> None:
    text = "so 1, so 2, well 3"
    spans = quoted_spans(text, ["so", "so", "not there", "", "well", "so"])
    assert [text[a:b] for a, b in spans] == ["so", "so", "well", "so"]
    assert [a for a, _ in spans] == [0, 6, 12, 0]
    assert all(a < b for (a, _), (b, _) in pairwise(spans[:3]))


def test_a_quote_is_not_found_within_a_word() -> None:
    text = "also 1, so 12"
    assert quoted_spans(text, ["so"]) == [(8, 10)]
    assert quoted_spans(text, ["1"]) == [(5, 6)]
    assert quoted_spans(text, ["2", "als"]) == []
    assert quoted_spans(text, [", so "]) == [(6, 11)]
    assert quoted_spans("\u6240\u4ee5\u7b54", ["\u4ee5"]) == [(1, 2)]
