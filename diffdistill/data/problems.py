"""What is wrong with a data set, collected so that the user sees all of it at once."""

import logging
from collections import Counter
from typing import Literal, NamedTuple

from diffdistill.errors import UserError

log = logging.getLogger(__name__)

NUM_SHOWN = 10


class Problem(NamedTuple):
    """One bad example.

    Attributes:
        kind: What it counts as, such as "missing caption".
        origin: Where it is ("file:line").
        detail: What exactly is wrong.
    """

    kind: str
    origin: str
    detail: str

    def __str__(self) -> str:
        """Return the problem in one line."""
        return f"{self.origin}: {self.kind}: {self.detail}"


def report(problems: list[Problem]) -> str:
    """Return how many problems there are of each kind, and the first ten."""
    counts = Counter(problem.kind for problem in problems)
    summary = ", ".join(f"{count} x {kind}" for kind, count in counts.most_common())
    lines = [f"  {problem}" for problem in problems[:NUM_SHOWN]]
    if len(problems) > NUM_SHOWN:
        lines.append(f"  ... and {len(problems) - NUM_SHOWN} more")
    return "\n".join([f"{len(problems)} bad examples ({summary})", *lines])


def settle(problems: list[Problem], on_error: Literal["error", "skip"]) -> None:
    """Log the problems where they are to be skipped.

    Raises:
        UserError: If there are any and they are not to be skipped.
    """
    if not problems:
        return
    if on_error == "error":
        raise UserError(f"{report(problems)}\nMend them, or leave them out with data.on_error=skip")
    log.warning("skipped %s", report(problems))
