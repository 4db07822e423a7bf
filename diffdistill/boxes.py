r"""The last ``\boxed{...}`` of a text, which is its answer by the convention of MATH.

Rewards and what a teacher is shown of a solution find it alike.
"""

import re
from typing import NamedTuple

_OPENING = re.compile(r"\\boxed\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


class Box(NamedTuple):
    """A box in a text.

    Attributes:
        start: Where it starts, with its backslash.
        stop: Where it stops, after its last brace.
        content: What is in it, without space around.
    """

    start: int
    stop: int
    content: str


def last_box(text: str) -> Box | None:
    r"""Return the box that is opened last, None if there is none or its braces are not balanced.

    Of boxes within boxes that is the innermost. Braces after a backslash do not count.
    """
    opening = None
    for found in _OPENING.finditer(text):
        opening = found
    if opening is None:
        return None
    depth = 1
    for found in _BRACES.finditer(text, opening.end()):
        depth += {"{": 1, "}": -1}.get(found.group(), 0)
        if depth == 0:
            content = text[opening.end() : found.start()].strip()
            return Box(opening.start(), found.end(), content)
    return None
