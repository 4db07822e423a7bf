"""OPSD: on-policy self-distillation from a reference solution (arXiv:2601.18734).

The student sees the question and answers. The teacher, the same model before training, sees the
question and a share of its reference solution. Their predictions of each token are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from diffdistill.exposures import check_answer
from diffdistill.rollouts import Solutions
from diffdistill.text.answering import check_exposure
from diffdistill.text.comparing import Comparing, Divergence
from diffdistill.types import Batch, Example, Loss, Progress


@dataclass(kw_only=True)
class OPSD(Comparing):
    """Match a teacher that has seen the solution, at the tokens of the student's own answers.

    Where options differ from those of ``opd``, they are those of the authors' code. The code also
    clips (``entry_clip``: 0.05 in its thinking recipes, 1e-6 in the others), which is off here:
    it turns the gradient of clipped entries round (docs/methods/opsd.md).

    Attributes:
        exposure: Share of the reference solution's segments that the teacher is shown, 1 in the
            paper. At 0 it is shown the final answer alone.
    """

    divergence: Divergence = "forward-kl"
    temperature: float = 1.1
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 1024
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
        """Yield one loss: a mean over the chosen tokens of the optimizer step."""
        yield self.distilled(self.attempt(batch, progress), progress)
