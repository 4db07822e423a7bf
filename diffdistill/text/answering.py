"""What methods share that let a student answer: its rollouts, and its predictions on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.projection import Prediction
from diffdistill.rollouts import AnswerFamily, Answers, Sampling
from diffdistill.types import Batch, Loss, Progress, State


class Attempt(NamedTuple):
    """What a student answered, and what it predicts there.

    Attributes:
        batch: The batch, a row for each answer.
        answers: The answers.
        state: Where models are asked.
        prediction: The student's ``[B, A, V]``, with its graph.
    """

    batch: Batch
    answers: Answers
    state: State
    prediction: Prediction


@dataclass(kw_only=True)
class Answering(Method):
    """What methods have in common whose student answers; not a method by itself.

    Attributes:
        family: The family of autoregressive models.
        draws: The random numbers of the run.
        student: The model to train; it answers.
        max_tokens: Tokens of the longest answer.
        temperature: Of sampling, and of all predictions in the loss.
        top_p: Sampling only: keep the most likely tokens that together have this probability. The
            loss is over all tokens, so below 1 the answers are not quite the student's own.
        top_k: Sampling only: keep so many most likely tokens; 0 keeps all.
        num_answers: Answers to each question.
    """

    answers: ClassVar = True

    family: AnswerFamily
    draws: Draws
    student: Any
    max_tokens: int = 512
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    num_answers: int = 1

    def __post_init__(self) -> None:
        """Check the options."""
        self._kept: dict[int, tuple[Batch, Answers]] = {}
        for name, fine, bounds in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", self.temperature > 0, "above 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k >= 0, "at least 0"),
        ):
            if not fine:
                raise ValueError(f"{name} must be {bounds}, not {getattr(self, name)}")

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.top_k)

    def attempt(self, batch: Batch, progress: Progress) -> Attempt:
        """Return the student's answers to a batch, and its predictions, one call with a graph.

        The answers are those of the survey, if there was one.
        """
        kept = self._kept.pop(int(batch["ids"][0]), None)
        return self.read(*(kept or self.answered(batch, progress)))

    def survey(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Answer a batch, once; return what the parts of a method add to it, to be pooled."""
        self._kept[int(batch["ids"][0])] = self.answered(batch, progress)
        return {}

    def surveyed(self, batch: Batch) -> tuple[Batch, Answers]:
        """Return what ``answered`` returned in the survey of a batch."""
        return self._kept[int(batch["ids"][0])]

    def answered(self, batch: Batch, progress: Progress) -> tuple[Batch, Answers]:
        """Return a row for each answer to a batch, and the answers: the student's own."""
        rows = self.family.repeated(batch, self.num_answers)
        return rows, self.family.rollout(
            self.student, rows, self.sampling, self.draws, purpose="rollout"
        )

    def read(self, rows: Batch, answers: Answers) -> Attempt:
        """Return what the student predicts of answers."""
        state = self.family.state(answers)
        return Attempt(rows, answers, state, self.student(state, self.family.condition(rows)))


def check_exposure(exposure: float | None) -> None:
    """Refuse what is no share; None shows nothing.

    Raises:
        ValueError: If it is not in [0, 1].
    """
    if exposure is not None and not 0 <= exposure <= 1:
        raise ValueError(f"exposure must be in [0, 1], not {exposure}")


def sampler_gap(answers: Answers, logprob: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Return how far log-probabilities of student and sampler are apart, on average, to be logged.

    With the student's own sampling at temperature alone it is rounding; an inference engine adds
    its own, and weights that it was not given. Nothing of answers that were given.
    """
    if answers.logprobs is None:
        return {}
    return {"sampler_gap": masked_mean((logprob.detach() - answers.logprobs).abs(), mask)}


def mean_loss(
    attempt: Attempt, error: Tensor, chosen: Tensor, maps: Mapping[str, Tensor], **metrics: Any
) -> Loss:
    """Return the student's loss: the mean of a map over the chosen tokens of the optimizer step.

    Args:
        attempt: What was answered.
        error: The map ``[B, A]``.
        chosen: The tokens that count, bool ``[B, A]``.
        maps: More maps ``[B, A]``, whose means are logged.
        metrics: More scalars to log.
    """
    answers = attempt.answers
    told = {name: masked_mean(value.detach(), chosen) for name, value in maps.items()}
    if "logprob" in maps:
        told |= sampler_gap(answers, maps["logprob"], chosen)
    told |= {
        "answer_tokens": answers.mask.sum(dim=1).float().mean(),
        "ended": answers.ended.float().mean(),
        "learned_share": chosen.sum() / answers.mask.sum().clamp(min=1),
    }
    value = masked_mean(error, chosen)
    return Loss("student", value, max(int(chosen.sum()), 1), metrics=told | metrics)
