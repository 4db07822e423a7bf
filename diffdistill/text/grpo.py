"""GRPO: reinforcement learning from verified answers (arXiv:2402.03300), Dr. GRPO and DAPO.

The student answers each question several times. Each answer is rewarded against the others; each
rollout is learned once. There is no teacher. A reference can hold the student back.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from diffdistill.projection import token_logprob
from diffdistill.text.held import Held
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class GRPO(Held):
    """Learn from which of several answers are right: the baseline and partner of distillation."""

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss."""
        attempt = self.attempt(batch, progress)
        rewards = self.rewards(attempt)
        logprob = token_logprob(
            attempt.prediction,
            attempt.answers.tokens,
            mask=self.rewarded_tokens(attempt),
            temperature=self.temperature,
        )
        value, count, told = self.held(attempt, self.advantages(rewards, progress), logprob)
        yield Loss("student", value, count, metrics=self.told(attempt, rewards) | told)
