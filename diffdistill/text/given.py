"""What methods share that learn the data's own texts: the cross-entropy of their tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.projection import Prediction, token_logprob
from diffdistill.rollouts import GivenFamily
from diffdistill.texts import Text
from diffdistill.types import Batch, Loss


class Lesson(NamedTuple):
    """What a student predicts of texts.

    Attributes:
        text: The texts.
        prediction: Of each token, ``[B, L, V]``, with its graph.
        logprobs: Log-probability ``[B, L]`` of each learned token; 0 of others.
    """

    text: Text
    prediction: Prediction
    logprobs: Tensor

    @property
    def cross_entropy(self) -> Tensor:
        """Return the mean over all learned tokens."""
        return masked_mean(-self.logprobs, self.text.maskable)

    @property
    def num_tokens(self) -> int:
        """Return the number of learned tokens."""
        return int(self.text.maskable.sum())


@dataclass(kw_only=True)
class Given(Method):
    """What methods have in common that learn given texts; not a method by itself.

    Attributes:
        family: The family of autoregressive models.
        draws: The random numbers of the run.
        student: The model to train.
    """

    answers: ClassVar = True
    given: ClassVar = True

    family: GivenFamily
    draws: Draws
    student: Any

    def read(self, batch: Batch) -> Lesson:
        """Return what the student predicts of a batch."""
        text = self.family.text(batch)
        prediction = self.student(self.family.state(batch), self.family.condition(batch))
        logprobs = token_logprob(prediction, text.tokens, mask=text.maskable)
        return Lesson(text, prediction, logprobs)

    def loss(self, lesson: Lesson, value: Tensor, metrics: Mapping[str, Tensor | float]) -> Loss:
        """Return the student's loss: a mean over the learned tokens of the optimizer step."""
        told = {"cross_entropy": lesson.cross_entropy.detach(), **metrics}
        return Loss("student", value, max(lesson.num_tokens, 1), metrics=told)
