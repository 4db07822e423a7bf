"""The baseline SFT of the scripts for language models: learn the data's own solutions."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diffdistill.projection import cross_entropy
from diffdistill.rollouts import Solutions
from diffdistill.text.answering import Answering, mean_loss
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class SFT(Answering):
    """Make the reference solutions likely; nobody answers, and there is no teacher."""

    roles: ClassVar = {"student": {"weights": "trained"}}

    def solutions(self) -> Solutions:
        """Return that the data's solutions are learned."""
        return "learned"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: the mean cross-entropy of the tokens of the optimizer step."""
        attempt = self.read(batch, self.family.given(batch))
        mask = attempt.answers.mask
        error = cross_entropy(attempt.prediction, attempt.answers.tokens, mask=mask)
        yield mean_loss(attempt, error, mask, {})
