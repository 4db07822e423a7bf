"""SFT: flow matching on data, the usual fine-tuning and the baseline.

The student sees the prompt and a noised target; it is told the true velocity. There is no
teacher. On a step-distilled model this undoes the distillation (arXiv:2605.05204).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from diffdistill.divergences import masked_mean, mse
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.protocols import Family, Model
from diffdistill.schedules import logit_normal_time, shifted
from diffdistill.types import Batch, Loss, Progress


@dataclass(kw_only=True)
class SFT(Method):
    """Regress the velocity ``noise - data`` on noised data.

    Attributes:
        family: The model family.
        draws: The random numbers of the run.
        student: The model to train.
        time: Density of the noise level: ``uniform`` or ``logit-normal`` (SD3).
        mean: Mean of the logit-normal density.
        std: Standard deviation of the logit-normal density.
        shift: Moves noise levels towards noise; 1 leaves them.
    """

    roles: ClassVar = {"student": {"weights": "trained"}}

    family: Family
    draws: Draws
    student: Model
    time: Literal["uniform", "logit-normal"] = "logit-normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def needs_images(self) -> bool:
        """Return True: the images are the targets."""
        return True

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the flow-matching loss of one noised batch; one model call."""
        clean = self.family.clean(batch)
        noise = self.draws.normal("noise", batch["ids"], clean.shape[1:])
        if self.time == "uniform":
            t = self.draws.uniform("time", batch["ids"])
        else:
            normal = self.draws.normal("time", batch["ids"], ())
            t = logit_normal_time(normal, mean=self.mean, std=self.std)
        state = self.family.noise(clean, shifted(t, self.shift), noise)
        velocity = self.student(state, self.family.condition(batch))
        yield Loss("student", masked_mean(mse(velocity, noise - clean)), count=len(clean))
