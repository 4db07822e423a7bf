"""Whether a whole answer is right, for questions that are answered in a word or a number.

Source: ours; the exact match of visual question answering, without its rewriting of words.
"""

from dataclasses import dataclass

from diffdistill.verifying import FinalAnswer


@dataclass(kw_only=True)
class Exact(FinalAnswer):
    """Whether the answer is the right one and nothing else."""

    def final(self, answer: str) -> str | None:
        """Return the whole text, None if it is empty."""
        return answer.strip() or None
