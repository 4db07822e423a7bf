r"""Whether the answer in the last box is right.

Source: ours; that the last ``\boxed{...}`` of a text is its answer is the convention of MATH
(Hendrycks et al., arXiv:2103.03874), whose graders we do not follow in rewriting LaTeX.
"""

from dataclasses import dataclass

from diffdistill.verifying import FinalAnswer

BOX = r"\boxed{"


@dataclass(kw_only=True)
class Boxed(FinalAnswer):
    r"""Whether the last ``\boxed{...}`` holds the right answer."""

    def final(self, answer: str) -> str | None:
        """Return what the last box holds, None without one, or if it is empty or open."""
        return final_box(answer) or None


def final_box(text: str) -> str | None:
    r"""Return what the last ``\boxed{...}`` of a text holds, None if there is none or it is open.

    Braces within must be balanced; escaped ones do not count.
    """
    _, box, rest = text.rpartition(BOX)
    depth, escaped = 1, False
    for place, character in enumerate(rest if box else ""):
        if not escaped:
            depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place].strip()
        escaped = character == "\\" and not escaped
    return None
