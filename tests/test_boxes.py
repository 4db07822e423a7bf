"""The last box of a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdistill.boxes import last_box


def counted(text: str) -> str | None:
    """Return the box that is opened last; of a text without other backslashes, by counting."""
    start = text.rfind("\\boxed{")
    for end in range(start + len("\\boxed{"), len(text) + 1) if start >= 0 else ():
        if text[start:end].count("{") == text[start:end].count("}"):
            return text[start:end]
    return None


@settings(deadline=None)
@given(st.lists(st.sampled_from(["\\boxed{", "{", "}", "a", " "]), max_size=30).map("".join))
def test_the_last_box_is_the_one_that_is_opened_last(text: str) -> None:
    box = last_box(text)
    assert (None if box is None else text[box.start : box.stop]) == counted(text)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("\\boxed{1} then \\boxed{2}.", "2"),
        ("\\boxed{\\frac{1}{2}} holds", "\\frac{1}{2}"),
        ("\\boxed{ 3\n}", "3"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed {4}", "4"),
        ("\\boxed{\\left\\{ 1 \\right.}", "\\left\\{ 1 \\right."),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\}}", "\\}"),
        ("\\boxed{a\\\\}", "a\\\\"),
        ("\\boxed{a\\}", None),
        ("\\boxed{{a}", None),
        ("\\boxed{5} and then \\boxed{6", None),
        ("{ \\boxed{7}", "7"),
        ("\\boxed{}", ""),
        ("} \\boxed{8}}", "8"),
        ("first\\\\\\boxed{9}", "9"),
        ("boxed{10}", None),
        ("\\boxed 11", None),
        ("", None),
    ],
)
def test_the_content_of_the_last_box(text: str, content: str | None) -> None:
    box = last_box(text)
    assert (None if box is None else box.content) == content


def test_many_open_boxes_take_no_time() -> None:
    assert last_box("\\boxed{" * 100_000) is None
    box = last_box("\\boxed{" * 100_000 + "1}")
    assert box is not None
    assert box.content == "1"
