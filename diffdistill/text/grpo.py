"""GRPO: reinforcement learning from verified answers (arXiv:2402.03300), Dr. GRPO and DAPO.

The student answers each question several times. Each answer is rewarded against the others; each
rollout is learned once. There is no teacher. A reference can hold the student back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from diffdistill.policy import aggregate, k3_penalty
from diffdistill.projection import token_logprob
from diffdistill.text.rewarded import Rewarded
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class GRPO(Rewarded):
    """Learn from which of several answers are right: the baseline and partner of distillation.

    Attributes:
        reference: What the student is held to. By default the student itself, which costs nothing
            and holds nothing: give it frozen weights if ``reference_weight`` is above 0.
        reference_weight: Of the k3 penalty for leaving the reference (0.04 in GRPO, 0 in Dr. GRPO
            and DAPO).
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "reference": {"weights": "live", "of": "student"},
    }

    reference: Any
    reference_weight: float = 0.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        settings = getattr(self.reference, "settings", None)
        if self.reference_weight and settings is not None and settings.weights == "live":
            raise ValueError(
                "reference_weight needs a reference that stays: set roles.reference.weights: frozen"
            )

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss."""
        attempt = self.attempt(batch, progress)
        rewards = self.rewards(attempt)
        mask, tokens = self.rewarded_tokens(attempt), attempt.answers.tokens
        logprob = token_logprob(attempt.prediction, tokens, mask=mask, temperature=self.temperature)
        value, count = self.policy(attempt, self.advantages(rewards), logprob)
        metrics = self.told(attempt, rewards)
        if self.reference_weight:
            with torch.no_grad():
                found = self.reference(attempt.state, self.family.condition(attempt.batch))
                known = token_logprob(found, tokens, mask=mask, temperature=self.temperature)
            error = k3_penalty(logprob, known)
            penalty, _ = aggregate(error, mask, self.aggregation, max_tokens=self.max_tokens)
            value = value + self.reference_weight * penalty
            metrics["reference_penalty"] = penalty.detach()
        yield Loss("student", value, count, metrics=metrics)
