"""How much of a reference solution a teacher is shown.

ATESD (arXiv:2605.11458) shows a share of the solution's segments, and always its boxed answer. We
know it from others' descriptions: no code is published, and none says what a segment is. The
segments here are ours.
"""

import math
import re
from itertools import pairwise

from diffdistill.boxes import Box, last_box
from diffdistill.errors import UserError
from diffdistill.types import Example

ENOUGH_SEGMENTS = 4
"""A coarse rule is used if it gives so many segments: then quarters of a solution differ."""

_RULES = (
    re.compile(r"\n[^\S\n]*\n\s*"),  # paragraphs
    re.compile(r"\n\s*"),  # lines
    re.compile(r"\n\s*|[.!?][)\]\"'$]*\s+|[\u3002\uff01\uff1f]\s*"),  # sentences
)


def segments(solution: str) -> list[str]:
    """Return the parts of a solution, which joined are the solution again.

    Ours: its paragraphs, if there are at least ``ENOUGH_SEGMENTS``; else its lines, if those are
    enough; else its sentences, however few. A segment ends with the white space that follows it,
    and none is blank unless the solution is. The final box is never divided.
    """
    box = last_box(solution)
    found: list[str] = []
    for rule in _RULES:
        found = _divided(solution, rule, box)
        if len(found) >= ENOUGH_SEGMENTS:
            break
    return found


def final_answer(solution: str) -> str | None:
    r"""Return the last ``\boxed{...}`` itself, as the solution has it; None without one."""
    box = last_box(solution)
    return None if box is None else solution[box.start : box.stop]


def reveal(solution: str, exposure: float, answer: str | None = None) -> str:
    """Return the part of a solution that is shown at an exposure in [0, 1].

    The first ``floor(exposure m)`` of its m segments, and then its final answer unless they hold
    it (ATESD): the answer alone at 0, the whole solution at 1.

    Args:
        solution: The reference solution.
        exposure: The share of its segments to show.
        answer: The final answer of a solution that has no box. Without both, the segments are
            all that is shown.

    Raises:
        ValueError: If the exposure is not in [0, 1].
    """
    if not 0.0 <= exposure <= 1.0:
        raise ValueError(f"exposure must be in [0, 1], not {exposure}")
    parts = segments(solution)
    # 0.29 * 100 is a little less than 29
    shown = "".join(parts[: math.floor(exposure * len(parts) + 1e-9)])
    box = last_box(solution)
    if len(shown) == len(solution) > 0 or (box is not None and box.stop <= len(shown)):
        return shown
    return shown + ((answer or "") if box is None else solution[box.start : box.stop])


def check_answer(example: Example, exposure: float | None) -> None:
    """Refuse a question of whose solution less than all would be shown, without a final answer.

    At a small exposure nothing at all would be shown of it.

    Args:
        example: The question.
        exposure: The smallest share of its solution that may be shown; None shows nothing.

    Raises:
        UserError: If its solution has no box, and it has no answer.
    """
    if exposure is None or exposure >= 1 or (example.answer or "").strip():
        return
    if final_answer(example.solution or "") is None:
        where = f"{example.origin}: " if example.origin else ""
        raise UserError(
            f"{where}there is no final answer to show with a part of the solution: add a column "
            "'answer' (data.answer_column names another), or a \\boxed{...} to the solution"
        )


def _divided(text: str, rule: re.Pattern[str], box: Box | None) -> list[str]:
    """Return the text cut after each match of the rule, but not before it starts or in the box."""
    first = len(text) - len(text.lstrip())
    ends = (match.end() for match in rule.finditer(text))
    inside = range(0) if box is None else range(box.start + 1, box.stop)
    cuts = [end for end in ends if first < end < len(text) and end not in inside]
    places = [0, *cuts, len(text)]
    return [text[a:b] for a, b in pairwise(places) if a < b]
