"""DMD2: step distillation by distribution matching (arXiv:2405.14867).

The student samples in a few steps (backward simulation). The teacher (frozen, guided) and the
critic (which tracks the student) see the re-noised sample; the difference of their clean
predictions is the student's gradient. The critic learns to denoise the student's samples.
Optionally a classifier head on the critic's features tells noised data from noised samples.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffdistill.divergences import (
    Normalizer,
    along,
    masked_mean,
    matching_direction,
    mse,
    softplus_gan,
)
from diffdistill.draws import Draws
from diffdistill.method import Method
from diffdistill.protocols import Discriminator, Family, Model
from diffdistill.readouts import GuidanceForm, clean, clean_of, guided_clean
from diffdistill.schedules import score_time
from diffdistill.types import Batch, Condition, Loss, Progress, State


class Goal(NamedTuple):
    """What pulls a finished sample; all constants.

    Attributes:
        direction: Distribution matching's gradient in it, of its shape.
        weight: Factor of the error there, broadcastable; None is 1.
        gradient: The adversarial loss's gradient in the sample; None without one.
        metrics: Scalars to log.
    """

    direction: Tensor
    weight: Tensor | None = None
    gradient: Tensor | None = None
    metrics: Mapping[str, Tensor] = {}

    def frames(self, start: int, stop: int) -> "Goal":
        """Return the part of the goal for some latent frames of ``[B, C, F, H, W]``."""
        weight, gradient = (
            None if part is None else part[:, :, start:stop]
            for part in (self.weight, self.gradient)
        )
        return Goal(self.direction[:, :, start:stop], weight, gradient, self.metrics)


@dataclass(kw_only=True)
class DMD(Method):
    """Match the distribution of a many-step teacher with a few-step student.

    Attributes:
        family: The model family.
        draws: The random numbers of the run.
        student: The few-step model to train.
        teacher: The frozen model whose guided score is the real one.
        critic: The model whose score is the fake one; it tracks the student.
        num_steps: Sampling steps of the student.
        sampler: ``renoise`` is DMD2's stochastic sampler; ``euler`` walks as the family's
            pipeline does, so that the plain pipeline samples from the student.
        exit: Which step's prediction is scored: ``random`` (one for the whole batch, shared
            by all ranks; DMD2 section 4.5) or ``last``.
        student_every: Steps between updates of the student; 5 in DMD2.
        ratio: ``every-step`` trains the critic in every step (DMD2, Self-Forcing, CausVid,
            FastVideo); ``alternating`` leaves it out in the student's steps (FastGen, rCM).
        guidance: Classifier-free guidance of the teacher.
        guidance_form: ``standard`` (1 = none) or ``extra`` (0 = none; Self-Forcing, CausVid).
        score_shift: Shift of the noise level at which scores are compared; 1 = uniform
            (DMD2), 5 in Self-Forcing.
        score_low: Smallest such noise level; 0.02 in DMD2.
        score_high: Largest such noise level; 0.98 in DMD2.
        epsilon: Added to DMD's normalizer; 0 in DMD2, 1e-6 in FastGen.
        normalizer: Whether that is a mean over each ``sample`` (DMD2, Self-Forcing, FastGen) or
            over the ``batch`` at hand (FastVideo; then micro-batches are not independent).
        reduction: ``mean`` is half the mean squared error of a sample; ``sum`` its sum, without
            the half (rCM). It matters to clipping alone where the optimizer is Adam.
        gan_weight: Weight of the adversarial term in the student's loss; 0 has none. 5e-3 in
            DMD2's SDXL. Needs data with images, and ``roles.critic.head: true``.
        gan_critic_weight: Weight of the adversarial term in the critic's loss; 1e-2 in DMD2.
    """

    roles: ClassVar = {
        "student": {"weights": "trained"},
        "teacher": {"weights": "frozen"},
        "critic": {"weights": "trained"},
    }

    family: Family
    draws: Draws
    student: Model
    teacher: Model
    critic: Discriminator
    num_steps: int = 4
    sampler: Literal["renoise", "euler"] = "renoise"
    exit: Literal["random", "last"] = "random"
    student_every: int = 5
    ratio: Literal["every-step", "alternating"] = "every-step"
    guidance: float = 1.0
    guidance_form: GuidanceForm = "standard"
    score_shift: float = 1.0
    score_low: float = 0.02
    score_high: float = 0.98
    epsilon: float = 0.0
    normalizer: Normalizer = "sample"
    reduction: Literal["mean", "sum"] = "mean"
    gan_weight: float = 0.0
    gan_critic_weight: float = 0.01

    def __post_init__(self) -> None:
        """Check the score times, that the critic is trained, and that it has its head."""
        if not 0.0 <= self.score_low <= self.score_high <= 1.0:
            raise ValueError("score_low and score_high must rise within [0, 1]")
        if self.ratio == "alternating" and self.student_every == 1:
            raise ValueError("ratio alternating with student_every 1 never trains the critic")
        if self.gan_weight > 0 and getattr(self.critic, "head", None) is None:
            raise ValueError("gan_weight above 0 needs roles.critic.head: true")

    def needs_images(self) -> bool:
        """Return whether the adversarial term compares with data."""
        return self.gan_weight > 0

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the student's loss when it is its turn, and the critic's when it is its."""
        prompt = self.family.condition(batch)
        train_student = progress.step % self.student_every == 0
        with torch.set_grad_enabled(train_student):
            sample = self._sample(batch, prompt, progress)
        if train_student:
            goal = self._goal(batch, prompt, sample.detach())
            value = self._towards(sample, goal)
            yield Loss("student", value, len(sample), metrics=goal.metrics)
        if not train_student or self.ratio == "every-step":
            yield self._critic_loss(batch, prompt, sample.detach())

    def _sample(self, batch: Batch, prompt: Condition, progress: Progress) -> Tensor:
        """Return the student's clean prediction at the exit step, with the graph of that step."""
        ids, shape = batch["ids"], self.family.latent_shape(batch)
        last = self.num_steps - 1
        if self.exit == "random":
            last = self.draws.integer("exit", progress.step, self.num_steps)

        def renoise(index: int) -> Tensor:
            return self.draws.normal(f"renoise/{index}", ids, shape)

        walk = self.family.walk(
            self.student,
            prompt,
            self.draws.normal("rollout", ids, shape),
            num_steps=self.num_steps,
            renoise=renoise if self.sampler == "renoise" else None,
        )
        with torch.no_grad():
            for _ in range(last):
                next(walk)
        return clean_of(*next(walk))

    def _noised(self, batch: Batch, sample: Tensor, purpose: str) -> tuple[State, Tensor]:
        """Return ``sample`` re-noised for scoring, and the noise."""
        ids = batch["ids"]
        t = score_time(
            self.draws.uniform(f"time/{purpose}", ids),
            shift=self.score_shift,
            low=self.score_low,
            high=self.score_high,
        )
        noise = self.draws.normal(f"noise/{purpose}", ids, sample.shape[1:])
        return self.family.noise(sample, t, noise), noise

    def _goal(self, batch: Batch, prompt: Condition, sample: Tensor) -> Goal:
        """Return where a finished ``sample`` (detached) should go."""
        with torch.no_grad():
            state, _ = self._noised(batch, sample, "student")
            fake = clean(self.critic, state, prompt)
            real = guided_clean(
                self.teacher,
                state,
                prompt,
                self.family.condition(batch, negative=True),
                scale=self.guidance,
                form=self.guidance_form,
            )
        direction = matching_direction(
            sample, real, fake, epsilon=self.epsilon, normalizer=self.normalizer
        )
        if self.gan_weight == 0:
            return Goal(direction)
        realism, gradient = self._realism(batch, prompt, sample)
        return Goal(direction, gradient=gradient, metrics={"gan": realism})

    def _towards(self, sample: Tensor, goal: Goal, share: float = 1.0) -> Tensor:
        """Return the student's loss of a share of the sample, and of its goal."""
        error = along(sample, goal.direction)
        value = masked_mean(error, weight=goal.weight)
        if self.reduction == "sum":
            value = value * (2.0 * error[0].numel() / share)
        if goal.gradient is None:
            return value
        # Linear in the sample, so its gradient is the head's and nothing reaches the critic.
        change = (goal.gradient * (sample - sample.detach())).sum() / share
        return value + self.gan_weight * (change + goal.metrics["gan"])

    def _realism(self, batch: Batch, prompt: Condition, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's adversarial loss, and its gradient in ``sample``."""
        with torch.enable_grad():
            leaf = sample.detach().requires_grad_()
            state, _ = self._noised(batch, leaf, "student")
            value = softplus(-self.critic.discriminate(state, prompt)).mean()
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient

    def _critic_loss(self, batch: Batch, prompt: Condition, sample: Tensor) -> Loss:
        state, noise = self._noised(batch, sample, "critic")
        value = masked_mean(mse(self.critic(state, prompt), noise - sample))
        if self.gan_weight == 0:
            return Loss("critic", value, len(sample))
        data, _ = self._noised(batch, self.family.clean(batch), "critic")
        telling = softplus_gan(
            self.critic.discriminate(data, prompt), self.critic.discriminate(state, prompt)
        ).mean()
        return Loss(
            "critic",
            value + self.gan_critic_weight * telling,
            len(sample),
            metrics={"gan": telling.detach()},
        )
