import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdistill.errors import UserError
from diffdistill.exposures import check_answer, final_answer, reveal, segments
from diffdistill.rewards.boxed import Boxed
from diffdistill.types import Example
from tests.conftest import CPU

PIECES = [
    "\\boxed{",
    "{",
    "}",
    "\\{",
    "\\}",
    "\\",
    "\n",
    "\n\n",
    " ",
    ". ",
    "\u3002",
    "4",
    "x = $2.$",
]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
EXPOSURES = st.floats(0.0, 1.0)

# a busy machine is no failure
quick = settings(deadline=None, max_examples=60)

SOLUTION = "One.\n\nTwo.\n\nThree.\n\nSo it is \\boxed{4}.\n"


@quick
@given(TEXTS)
def test_segments_joined_are_the_text(text: str) -> None:
    parts = segments(text)
    assert "".join(parts) == text
    assert all(parts)
    assert len(parts) <= 1 or all(part.strip() for part in parts)


@quick
@given(TEXTS, st.none() | st.text())
def test_everything_is_shown_at_one(text: str, answer: str | None) -> None:
    assert text == "" or reveal(text, 1.0, answer) == text


@quick
@given(TEXTS, st.text())
def test_the_answer_alone_is_shown_at_zero(text: str, answer: str) -> None:
    boxed = final_answer(text)
    assert reveal(text, 0.0, answer) == (answer if boxed is None else boxed)


@quick
@given(TEXTS, EXPOSURES, EXPOSURES)
def test_more_exposure_never_shows_less(text: str, first: float, second: float) -> None:
    low, high = sorted((first, second))
    boxed = final_answer(text) or ""
    less, more = reveal(text, low), reveal(text, high)
    # what is shown is a prefix of the text, perhaps followed by the answer
    prefixes = [
        shown if text.startswith(shown) else shown.removesuffix(boxed) for shown in (less, more)
    ]
    assert text.startswith(prefixes[0])
    assert text.startswith(prefixes[1])
    assert len(prefixes[0]) <= len(prefixes[1])


@quick
@given(TEXTS, EXPOSURES)
def test_the_share_of_segments_is_rounded_down(text: str, exposure: float) -> None:
    parts = segments(text)
    shown = "".join(parts[: math.floor(exposure * len(parts) + 1e-9)])
    assert reveal(text, exposure) in {shown, shown + (final_answer(text) or "")}


@quick
@given(TEXTS, EXPOSURES)
def test_the_final_answer_is_shown_at_every_exposure(text: str, exposure: float) -> None:
    boxed = final_answer(text)
    assert boxed is None or boxed in reveal(text, exposure)


def test_a_solution_is_shown_segment_by_segment() -> None:
    shown = [reveal(SOLUTION, share) for share in (0.0, 0.24, 0.25, 0.5, 0.99, 1.0)]
    assert shown == [
        "\\boxed{4}",
        "\\boxed{4}",
        "One.\n\n\\boxed{4}",
        "One.\n\nTwo.\n\n\\boxed{4}",
        "One.\n\nTwo.\n\nThree.\n\n\\boxed{4}",
        SOLUTION,
    ]


def test_an_answer_that_is_already_shown_is_not_repeated() -> None:
    text = "It is \\boxed{4}.\n\nFor two.\n\nAnd two.\n\nAre four."
    assert reveal(text, 0.5) == "It is \\boxed{4}.\n\nFor two.\n\n"


def test_a_solution_without_a_box_is_followed_by_the_given_answer() -> None:
    assert reveal("One.\nTwo.\nThree.\nFour.", 0.5, "4") == "One.\nTwo.\n4"
    assert reveal("One.\nTwo.\nThree.\nFour.", 0.5) == "One.\nTwo.\n"
    assert reveal("", 1.0, "4") == "4"


def test_a_share_of_a_hundred_segments_is_exact() -> None:
    text = "".join(f"{i}\n" for i in range(100))
    for percent in range(101):
        assert reveal(text, percent / 100).count("\n") == percent


def test_paragraphs_are_segments_where_there_are_four() -> None:
    text = "\n a.\nb\n\nc\n \t\r\n d\n\n\ne. f\n"
    assert segments(text) == ["\n a.\nb\n\n", "c\n \t\r\n ", "d\n\n\n", "e. f\n"]


def test_lines_are_segments_where_there_are_few_paragraphs() -> None:
    assert segments("a. b\nc\n\nd\r\ne") == ["a. b\n", "c\n\n", "d\r\n", "e"]


def test_sentences_are_segments_where_there_are_few_lines() -> None:
    assert segments("So $x = 3.14.$ Is it? Yes!\nIt is.") == [
        "So $x = 3.14.$ ",
        "Is it? ",
        "Yes!\n",
        "It is.",
    ]
    assert segments("\u3042\u3002\u3044\uff1f\u3046") == ["\u3042\u3002", "\u3044\uff1f", "\u3046"]


def test_the_final_box_is_never_divided() -> None:
    assert segments("See: \\boxed{\\text{No. Or\n\nyes. So}} Then. End.") == [
        "See: \\boxed{\\text{No. Or\n\nyes. So}} Then. ",
        "End.",
    ]


def test_the_answer_of_a_solution_is_the_one_that_a_reward_reads() -> None:
    nested, cut = "So \\boxed{\\boxed{5}}", "\\boxed{5} and then \\boxed{6"
    judge = Boxed(device=CPU)
    assert (final_answer(nested), judge.final(nested)) == ("\\boxed{5}", "5")
    assert (final_answer(cut), judge.final(cut)) == (None, None)
    with pytest.raises(UserError, match="no final answer to show"):
        check_answer(Example("?", solution=cut), 0.5)
    check_answer(Example("?", solution=cut, answer="6"), 0.5)


@pytest.mark.parametrize("exposure", [-0.01, 1.01, math.nan])
def test_an_exposure_outside_of_the_unit_interval_is_refused(exposure: float) -> None:
    with pytest.raises(ValueError, match="exposure"):
        reveal(SOLUTION, exposure)


@pytest.mark.parametrize("exposure", [0.0, 0.999])
def test_a_part_of_a_solution_is_shown_with_a_final_answer_or_not_at_all(exposure: float) -> None:
    bare = Example("?", solution="It is four.", origin="here:7")
    with pytest.raises(UserError, match=r"^here:7: there is no final answer to show with a part"):
        check_answer(bare, exposure)
    check_answer(bare._replace(answer="4"), exposure)
    check_answer(bare._replace(solution=SOLUTION), exposure)
    for share in (None, 1.0):  # nothing, or all of it
        check_answer(bare, share)
