"""What methods share that hold a rewarded student to a reference."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffdistill.policy import aggregate, k3_penalty
from diffdistill.projection import token_logprob
from diffdistill.text.answering import Attempt, sampler_gap
from diffdistill.text.rewarded import Rewarded


@dataclass(kw_only=True)
class Held(Rewarded):
    """Rewards answers, less a penalty for leaving a reference.

    Attributes:
        reference: What the student is held to. By default the student itself, which costs nothing
            and holds nothing: give it frozen weights if ``reference_weight`` is above 0.
        reference_weight: Of the k3 penalty for leaving the reference (0.04 in GRPO, 0.01 or 0.001
            in SDAR's scripts, 0 in Dr. GRPO and DAPO).
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

    def held(
        self, attempt: Attempt, advantages: Tensor, logprob: Tensor
    ) -> tuple[Tensor, int, dict[str, Tensor]]:
        """Return the policy-gradient loss and penalty, what it is the mean of, and what to log.

        The arguments are those of ``policy``.
        """
        value, count = self.policy(attempt, advantages, logprob)
        mask, tokens = self.rewarded_tokens(attempt), attempt.answers.tokens
        told = sampler_gap(attempt.answers, logprob, mask)
        if not self.reference_weight:
            return value, count, told
        with torch.no_grad():
            found = self.reference(attempt.state, self.family.condition(attempt.batch))
            known = token_logprob(found, tokens, mask=mask, temperature=self.temperature)
        error = k3_penalty(logprob, known)
        penalty, _ = aggregate(error, mask, self.aggregation, max_tokens=self.max_tokens)
        value = value + self.reference_weight * penalty
        return value, count, told | {"reference_penalty": penalty.detach()}
