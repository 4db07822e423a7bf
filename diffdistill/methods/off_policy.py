"""Off-policy distillation: D-OPSD's teacher and divergence, on states not the student's own.

The states are noised data, or the rollout of the teacher. The baseline that shows what being
on-policy adds (the ablation of arXiv:2605.05204, fig. 6).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from diffdistill.divergences import masked_mean, mse
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.protocols import Family, Model
from diffdistill.readouts import per_sample
from diffdistill.types import Batch, Condition, Loss, Progress, State
from diffdistill.weights import VelocityWeight, velocity_weight


@dataclass(kw_only=True)
class OffPolicy(Method):
    """Match a teacher that also sees the target image, at states of the data or the teacher.

    Attributes:
        family: The model family.
        draws: The random numbers of the run.
        student: The model to train; it sees the prompt.
        teacher: Sees the prompt and the target.
        states: ``data`` noises the target image to each level of the sampling grid;
            ``teacher`` visits the states of the teacher's own rollout.
        num_steps: Number of states; the grid is that of sampling in as many steps.
        weight: As in D-OPSD.
        exposure: Share of the privileged context the teacher sees.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "ema", "of": "student", "decay": 0.9999},
    }

    family: Family
    draws: Draws
    student: Model
    teacher: Model
    states: Literal["data", "teacher"] = "data"
    num_steps: int = 4
    weight: VelocityWeight = "uniform"
    exposure: float = 1.0

    def needs_images(self) -> bool:
        """Return whether the states are noised images."""
        return self.states == "data"

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield one velocity loss for each state; 2 ``num_steps`` model calls."""
        prompt = self.family.condition(batch)
        prompt_and_target = self.family.condition(batch, exposure=self.exposure)
        visited = self._visited(batch, prompt_and_target)
        for index, (state, teacher) in enumerate(visited):
            error = mse(self.student(state, prompt), teacher)
            weight = per_sample(velocity_weight(state.t, self.weight), state.x)
            yield Loss(
                "student",
                masked_mean(error, weight=weight),
                count=len(state.x),
                more=index + 1 < self.num_steps,
            )

    def _visited(self, batch: Batch, shown: Condition) -> Iterator[tuple[State, torch.Tensor]]:
        """Yield each state with the teacher's velocity there."""
        shape = self.family.latent_shape(batch)
        noise = self.draws.normal("rollout", batch["ids"], shape)
        if self.states == "teacher":
            walk = self.family.walk(self.teacher, shown, noise, num_steps=self.num_steps)
            for _ in range(self.num_steps):
                with torch.no_grad():
                    visited = next(walk)
                yield visited
            return
        clean = self.family.clean(batch)
        for level in self.family.grid(self.num_steps, shape).tolist()[:-1]:
            state = self.family.noise(clean, clean.new_full((len(clean),), level), noise)
            with torch.no_grad():
                velocity = self.teacher(state, shown)
            yield state, velocity
