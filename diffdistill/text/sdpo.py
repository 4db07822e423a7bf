"""SDPO: self-distillation from the student's own successes (arXiv:2601.20802).

The student answers each question several times. The teacher, an average of the student, is shown
another answer to the same question that was right, and reads along; where there is none, there is
nothing to learn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.projection import Prediction
from diffdistill.supports import Correction, Support, TopK
from diffdistill.text.answering import Attempt, mean_loss
from diffdistill.text.comparing import Comparing, Divergence
from diffdistill.types import Batch, Example, Loss, Progress
from diffdistill.verifying import AnswerReward

NOTHING = "-"
"""Shown where no answer was right, so that there is a prompt; nothing is learned there."""


@dataclass(kw_only=True)
class SDPO(Comparing):
    """Match a teacher that is shown a right answer of the student's, at the tokens of all others.

    Defaults are those of the authors' code. It also weighs tokens by the ratio of the student to
    what it was when it answered, which is 1 here: each rollout is learned once.

    Attributes:
        reward: Verifies answers; the reward is nothing to learn from by itself.
        num_answers: Answers to each question.
        right: The reward from which an answer is right.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "ema", "of": "student", "decay": 0.95},
    }

    reward: AnswerReward
    num_answers: int = 8
    right: float = 1.0
    divergence: Divergence = "jsd"
    support: Support | Literal["full"] = "student"
    support_size: int = 100
    correction: Correction = "tail"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if self.num_answers < 2:
            raise ValueError("num_answers must be at least 2: a teacher is shown another answer")

    def check_question(self, example: Example) -> None:
        """Refuse a question whose answers cannot be verified.

        Raises:
            UserError: If it has no answer.
        """
        super().check_question(example)
        self.reward.check(example)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over the chosen tokens of answers whose teacher was shown one."""
        attempt = self.attempt(batch, progress)
        shown, rewards = self._siblings(attempt)
        taught = torch.tensor([text is not None for text in shown], device=rewards.device)
        theirs = self.judge(attempt, progress)
        chosen = self.chosen(attempt, theirs, progress) & taught[:, None]
        maps = self.compared(attempt, theirs, chosen)
        error = maps.pop("divergence")
        metrics = {"reward": rewards.mean(), "taught_share": taught.float().mean()}
        yield mean_loss(attempt, error, chosen, maps, **metrics)

    def shown(self, progress: Progress) -> float:
        """Return that the teacher is shown all of the other answer."""
        return 1.0

    def judge(self, attempt: Attempt, progress: Progress) -> Prediction | TopK:
        """Return what the teacher predicts that is shown another answer, without a graph."""
        solutions = [text or NOTHING for text in self._siblings(attempt)[0]]
        told = attempt._replace(batch=self.family.with_solutions(attempt.batch, solutions))
        return super().judge(told, progress)

    def _siblings(self, attempt: Attempt) -> tuple[list[str | None], Tensor]:
        """Return the right answer that is shown beside each, and the reward of each ``[B]``."""
        texts = self.family.spelled(attempt.answers)
        rewards = self.reward.score(texts, self.family.examples(attempt.batch))
        return siblings(texts, rewards >= self.right, self.num_answers), rewards


def siblings(texts: Sequence[str], right: Tensor, num_answers: int) -> list[str | None]:
    """Return for each answer the next right one to the same question, None where there is none.

    The next in the order of the answers, after the last the first again; never the answer itself.
    """
    found: list[str | None] = []
    for row in range(len(texts)):
        start = row - row % num_answers
        others = ((row - start + step) % num_answers + start for step in range(1, num_answers))
        found.append(next((texts[other] for other in others if right[other]), None))
    return found
