"""SFT of an autoregressive language model: learn the data's own texts, without a teacher.

The baseline of all methods that a teacher has a part in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diffdistill.text.given import Given
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class SFT(Given):
    """Make the answers of chats, or plain texts, likely."""

    roles: ClassVar = {"student": {"weights": "trained"}}

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: the mean cross-entropy of the tokens of the optimizer step."""
        lesson = self.read(batch)
        yield self.loss(lesson, lesson.cross_entropy, {})
