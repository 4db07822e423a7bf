"""ATESD: self-distillation whose teacher is shown as much as helps (arXiv:2605.11458).

The student sees the question and answers. The teacher, the same model before training, sees the
question, the first part of the reference solution and its final answer. How large that part is, is
learned from whether the student gets better.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from diffdistill.errors import UserError
from diffdistill.supports import TopK
from diffdistill.text.answering import mean_loss
from diffdistill.text.comparing import Divergence
from diffdistill.text.exposed import Exposed
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class ATESD(Exposed):
    """OPSD with a learned exposure; the other options are those of ``opsd``."""

    divergence: Divergence = "forward-kl"
    temperature: float = 1.1
    top_p: float = 0.95
    top_k: int = 20
    max_tokens: int = 1024

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one loss: a mean over the chosen tokens of the optimizer step."""
        exposure = self.shown(progress)
        attempt = self.attempt(batch, progress)
        theirs = self.judge(attempt, progress)
        if isinstance(theirs, TopK):
            raise UserError("method atesd needs a teacher of its own, not a server")
        chosen = self.chosen(attempt, theirs, progress)
        maps = self.compared(attempt, theirs, chosen)
        told = self.watched(batch, attempt, theirs, exposure) | self.told_exposure(exposure)
        yield mean_loss(attempt, maps.pop("divergence"), chosen, maps, **told)
