"""OPD: on-policy distillation of a language model (GKD, arXiv:2306.13649; Thinking Machines, 2025).

The student answers. Student and teacher both see the question, and their predictions of each token
of the answer are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from diffdistill.rollouts import Answers, Solutions
from diffdistill.text.comparing import Comparing
from diffdistill.types import Batch, Loss, Progress

PARTS = 1 << 20
"""How finely a share of steps is told."""


@dataclass(kw_only=True)
class OPD(Comparing):
    """Match a teacher at the tokens of the student's own answers.

    Attributes:
        on_policy_share: Share of the steps with answers of the student's own (GKD's lambda; 1 is
            purely on-policy).
        off_policy: Whose answers the other steps take: those of the ``data``, or of the
            ``teacher``, which writes them as the student would its own (GKD's supervised KD; the
            warm-up of Sparse-to-Dense, arXiv:2605.12483, with ``divergence: forward-kl``).
    """

    on_policy_share: float = 1.0
    off_policy: Literal["data", "teacher"] = "data"

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        if not 0 <= self.on_policy_share <= 1:
            raise ValueError(f"on_policy_share must be in [0, 1], not {self.on_policy_share}")
        for what, asked in (
            ("divergence sampled", self.divergence == "sampled"),
            ("correction hybrid", self.hybrid),
        ):
            if asked and self.on_policy_share < 1:
                raise ValueError(f"{what} needs answers of the student's own alone")

    def solutions(self) -> Solutions:
        """Return whether the data's own answers are learned."""
        learned = self.on_policy_share < 1 and self.off_policy == "data"
        return "learned" if learned else "unused"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over the chosen tokens of the optimizer step."""
        yield self.distilled(self.attempt(batch, progress), progress)

    def answered(self, batch: Batch, progress: Progress) -> tuple[Batch, Answers]:
        """Return the student's answers, or in the other steps those of data or teacher."""
        if self.draws.integer("mix", progress.step, PARTS) < self.on_policy_share * PARTS:
            return super().answered(batch, progress)
        if self.off_policy == "data":
            return batch, self.family.given(batch)
        rows = self.family.repeated(batch, self.num_answers)
        answers = self.family.rollout(
            self.teacher, rows, self.sampling, self.draws, purpose="teacher", reader="teacher"
        )
        return rows, answers._replace(logprobs=None)  # theirs: no gap of a sampler
