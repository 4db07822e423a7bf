r"""Whether the answer in the last box is right.

Source: ours; that the last ``\boxed{...}`` of a text is its answer is the convention of MATH
(Hendrycks et al., arXiv:2103.03874), whose graders we do not follow in rewriting LaTeX.
"""

from dataclasses import dataclass

from diffdistill.boxes import last_box
from diffdistill.verifying import FinalAnswer


@dataclass(kw_only=True)
class Boxed(FinalAnswer):
    r"""Whether the last ``\boxed{...}`` holds the right answer."""

    def final(self, answer: str) -> str | None:
        """Return what the last box holds, None without one, or if it is empty or open."""
        box = last_box(answer)
        return None if box is None else box.content or None
