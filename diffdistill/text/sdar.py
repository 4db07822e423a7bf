"""SDAR: reinforcement learning with gated self-distillation (arXiv:2605.15155).

The student answers several times, and is rewarded as in GRPO. The teacher, the student itself shown
privileged context, reads the answers; each token is made more likely by how much more likely the
teacher finds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffdistill.divergences import masked_mean
from diffdistill.errors import UserError
from diffdistill.exposures import check_answer
from diffdistill.gates import sdar_map
from diffdistill.projection import token_maps
from diffdistill.rollouts import Solutions
from diffdistill.supports import TopK
from diffdistill.text.answering import Attempt, check_exposure
from diffdistill.text.gated import Gated
from diffdistill.text.held import Held
from diffdistill.types import Batch, Example, Loss, Progress


@dataclass(kw_only=True)
class SDAR(Gated, Held):
    """Add to GRPO a policy gradient whose reward is the gate.

    The distilled term is g (log teacher - log student) of the sampled token with a constant g: it
    makes every token more likely, in proportion to g, and is no divergence (docs/methods/sdar.md).

    Attributes:
        weight: Of the distilled term; 0.01 in the released scripts, 0.1 in the code's default.
        reward_weight: Of the rewarded term.
        exposure: What the teacher is shown of the reference solution.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "live", "of": "student"},
        "reference": {"weights": "live", "of": "student"},
    }

    num_answers: int = 8
    weight: float = 0.01
    reward_weight: float = 1.0
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

    def shown(self, progress: Progress) -> float:
        """Return the exposure."""
        return self.exposure

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: the rewarded and the distilled term."""
        attempt = self.attempt(batch, progress)
        rewards = self.rewards(attempt)
        maps, chosen = self._judged(attempt, progress)
        ours, judged = maps["logprob"], maps["teacher-logprob"]
        gate = self.gates(attempt, ours.detach(), judged, maps)
        gate = self.scaled(gate, chosen, progress)
        distilled = masked_mean(sdar_map(ours, judged, gate), chosen)
        value, count, told = self.held(attempt, self.advantages(rewards, progress), ours)
        metrics = self.told(attempt, rewards) | told
        metrics |= {
            "distillation": distilled.detach(),
            "gate": masked_mean(gate, chosen),
            "gap": masked_mean(judged - ours.detach(), chosen),
        }
        value = self.reward_weight * value + self.weight * distilled
        yield Loss("student", value, count, metrics=metrics)

    def opened(self, attempt: Attempt, progress: Progress) -> tuple[Tensor, Tensor]:
        """Return the gate of each token before it is scaled, and which count, bool; ``[B, A]``."""
        maps, chosen = self._judged(attempt, progress)
        return self.gates(attempt, maps["logprob"], maps["teacher-logprob"], maps), chosen

    def _judged(self, attempt: Attempt, progress: Progress) -> tuple[dict[str, Tensor], Tensor]:
        """Return what student and teacher make of each token, and which count, bool ``[B, A]``."""
        theirs = self.judge(attempt, progress)
        if isinstance(theirs, TopK):
            raise UserError("method sdar needs a teacher of its own, not a server")
        maps = token_maps(
            attempt.prediction,
            theirs,
            ["logprob", "teacher-logprob", "entropy"],
            tokens=attempt.answers.tokens,
            mask=attempt.answers.mask,
            temperature=self.temperature,
            trained="logprob",
        )
        return maps, self.chosen(attempt, theirs, progress)
