"""GRPO: reinforcement learning from verified answers (arXiv:2402.03300), Dr. GRPO and DAPO.

The student answers each question several times. Each answer is rewarded against the others. There
is no teacher, and no penalty for leaving the reference (as in DAPO and Dr. GRPO); each rollout is
learned once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from diffdistill.text.rewarded import Rewarded
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class GRPO(Rewarded):
    """Learn from which of several answers are right: the baseline and partner of distillation."""

    roles: ClassVar = {"student": {"weights": "trained"}}

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss."""
        attempt = self.attempt(batch)
        rewards = self.rewards(attempt)
        value, count = self.policy(attempt, self.advantages(rewards))
        yield Loss("student", value, count, metrics=self.told(attempt, rewards))
