"""SFT of autoregressive models: the data's own answers are made likely.

The student sees the question and is told the answer. Nobody answers, and there is no teacher: what
is learned is in the data, which another model may have written (``diffdistill tessy write``).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.projection import cross_entropy
from diffdistill.rollouts import AnswerFamily, Solutions
from diffdistill.text.answering import Attempt, mean_loss
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class AnswerSFT(Method):
    """Learn the solutions, or the answers that chats end with, token by token.

    Attributes:
        family: The family of autoregressive models.
        draws: The random numbers of the run.
        student: The model to train.
    """

    answers: ClassVar = True
    roles: ClassVar = {"student": {"weights": "trained"}}

    family: AnswerFamily
    draws: Draws
    student: Any

    def solutions(self) -> Solutions:
        """Return that the data's solutions are learned."""
        return "learned"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: the mean cross-entropy of the answers' tokens of the optimizer step."""
        answers = self.family.given(batch)
        state = self.family.state(answers)
        found = self.student(state, self.family.condition(batch))
        error = cross_entropy(found, answers.tokens, mask=answers.mask)
        yield mean_loss(Attempt(batch, answers, state, found), error, answers.mask, {})
