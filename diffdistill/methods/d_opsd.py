"""D-OPSD: on-policy self-distillation of a few-step model (arXiv:2605.05204).

The student sees the prompt and samples with its own few steps. The teacher (an average of the
student, the frozen base, or the student itself) sees the prompt and the target image. At every
state of the student's rollout their velocities are compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from diffdistill.divergences import masked_mean, mse
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.protocols import Family, Model
from diffdistill.readouts import per_sample
from diffdistill.types import Batch, Loss, Progress
from diffdistill.weights import VelocityWeight, velocity_weight


@dataclass(kw_only=True)
class DOPSD(Method):
    """Match a teacher that also sees the target image, where the student itself has been.

    Attributes:
        family: The model family.
        draws: The random numbers of the run.
        student: The model to train; it sees the prompt.
        teacher: Sees the prompt and the target.
        num_steps: Model calls of the rollout; the number used at inference.
        weight: ``uniform`` is eq. 7 of the paper. ``sigma2`` is the x0 error of the authors'
            released scripts.
        exposure: Share of the privileged context the teacher sees; 1 in the paper. At 0, with
            a ``live`` teacher, there is nothing to learn.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "ema", "of": "student", "decay": 0.9999},
    }

    family: Family
    draws: Draws
    student: Model
    teacher: Model
    num_steps: int = 4
    weight: VelocityWeight = "uniform"
    exposure: float = 1.0

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one velocity loss for each state of the rollout; 2 ``num_steps`` model calls."""
        prompt = self.family.condition(batch)
        prompt_and_target = self.family.condition(batch, exposure=self.exposure)
        noise = self.draws.normal("rollout", batch["ids"], self.family.latent_shape(batch))
        walk = self.family.walk(self.student, prompt, noise, num_steps=self.num_steps)
        for index, (state, student) in enumerate(walk):
            with torch.no_grad():
                teacher = self.teacher(state, prompt_and_target)
            weight = per_sample(velocity_weight(state.t, self.weight), state.x)
            yield Loss(
                "student",
                masked_mean(mse(student, teacher), weight=weight),
                count=len(noise),
                more=index + 1 < self.num_steps,
            )
