"""ExOPD: on-policy distillation beyond the teacher (G-OPD, arXiv:2602.12125), and short of it.

The student answers. Teacher and reference (the student before training, or the teacher before its
own reinforcement learning) read the answer; the student is compared with what lies beyond the
teacher, seen from the reference.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from diffdistill.errors import UserError
from diffdistill.exposures import check_answer
from diffdistill.rollouts import Solutions
from diffdistill.supports import TopK
from diffdistill.text.answering import check_exposure, mean_loss
from diffdistill.text.extrapolating import Extrapolating
from diffdistill.types import Batch, Example, Loss, Progress


@dataclass(kw_only=True)
class ExOPD(Extrapolating):
    """Match a target that lies ``strength`` times as far from the reference as the teacher.

    Attributes:
        exposure: What the teacher is shown of the reference solution; null shows nothing, as in
            ExOPD. beta-OPSD shows all of it.
    """

    exposure: float | None = None

    def __post_init__(self) -> None:
        """Check the options."""
        super().__post_init__()
        check_exposure(self.exposure)

    def solutions(self) -> Solutions:
        """Return whether the teacher is shown solutions."""
        return "unused" if self.exposure is None else "shown"

    def check_question(self, example: Example) -> None:
        """Refuse a question of whose solution only a part, without an answer, would be shown.

        Raises:
            UserError: If there is no final answer to show.
        """
        super().check_question(example)
        check_answer(example, self.exposure)

    def shown(self, progress: Progress) -> float | None:
        """Return the exposure."""
        return self.exposure

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over the chosen tokens of the optimizer step."""
        attempt = self.attempt(batch, progress)
        theirs = self.judge(attempt, progress)
        if isinstance(theirs, TopK):
            raise UserError("method exopd needs a teacher of its own, not a server")
        chosen = self.chosen(attempt, theirs, progress)
        target = self.target(attempt, theirs, chosen, progress)
        maps = self.compared(attempt, theirs, chosen, **target)
        told = self.told_strength(target, chosen)
        yield mean_loss(attempt, maps.pop("divergence"), chosen, maps, **told)
