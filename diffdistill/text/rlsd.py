"""RLSD and RLRT: a reward whose credit to tokens comes from a teacher that sees more.

The student answers several times, and is rewarded as in GRPO. The teacher, the student itself shown
the reference solution, says by how much each token is its own: RLSD follows it, and RLRT
(arXiv:2605.10781) on right answers follows what it would not have said.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from diffdistill.exposures import check_answer
from diffdistill.policy import reweighted_advantages
from diffdistill.projection import token_logprob
from diffdistill.rollouts import Solutions
from diffdistill.text.answering import check_exposure
from diffdistill.text.held import Held
from diffdistill.types import Batch, Example, Loss, Progress


@dataclass(kw_only=True)
class RLSD(Held):
    """Weigh the advantage of each token by how likely a privileged teacher finds it.

    The papers were read second-hand, and RLSD in the code of SDAR; see docs/methods/rlsd.md.

    Attributes:
        teacher: Sees the reference solution.
        form: ``rlsd`` weighs by teacher over student where the advantage is positive, and by the
            inverse where it is not; ``rlrt`` by the inverse of that, on rewarded answers only.
        share: How much of the advantage is weighed; 0.5 in both.
        share_steps: Steps over which the share falls to 0 (100 in SDAR's code of RLSD); null keeps
            it.
        weight_clip: Weights stay within 1 minus and plus this.
        right: With ``rlrt``, the reward from which an answer is right.
        exposure: What the teacher is shown of the reference solution.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "live", "of": "student"},
        "reference": {"weights": "live", "of": "student"},
    }

    teacher: Any
    form: Literal["rlsd", "rlrt"] = "rlsd"
    share: float = 0.5
    share_steps: int | None = None
    weight_clip: float = 0.2
    right: float = 1.0
    exposure: float = 1.0

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_exposure(self.exposure)

    def solutions(self) -> Solutions:
        """Return that the teacher is shown solutions."""
        return "shown"

    def check_question(self, example: Example) -> None:
        """Refuse a question of whose solution only a part, without an answer, would be shown.

        Raises:
            UserError: If there is no final answer to show.
        """
        super().check_question(example)
        check_answer(example, self.exposure)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss."""
        attempt = self.attempt(batch, progress)
        rewards = self.rewards(attempt)
        mask, tokens = self.rewarded_tokens(attempt), attempt.answers.tokens
        ours = token_logprob(attempt.prediction, tokens, mask=mask, temperature=self.temperature)
        condition = self.family.condition(attempt.batch, reader="teacher", exposure=self.exposure)
        with torch.no_grad():
            found = self.teacher(attempt.state, condition)
            theirs = token_logprob(found, tokens, mask=mask, temperature=self.temperature)
        advantages = reweighted_advantages(
            self.advantages(rewards, progress),
            ours,
            theirs,
            mask,
            form=self.form,
            share=self.share * self._left(progress.step),
            clip=self.weight_clip,
            rewarded=rewards >= self.right if self.form == "rlrt" else None,
        )
        value, count, told = self.held(attempt, advantages, ours)
        yield Loss("student", value, count, metrics=self.told(attempt, rewards) | told)

    def _left(self, step: int) -> float:
        """Return what is left of the share at a step."""
        return 1.0 if self.share_steps is None else max(0.0, 1.0 - step / self.share_steps)
