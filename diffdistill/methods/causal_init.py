"""A causal student from a bidirectional checkpoint, to begin Self-Forcing from.

``diffusion-forcing`` and ``teacher-forcing`` train on videos: the student sees each block at a
noise level of its own, after the noised or the clean past (arXiv:2407.01392; arXiv:2506.08009,
section 3.1). ``ode`` needs prompts alone: the student regresses the ends of the teacher's
sampling trajectories from their states at the student's few noise levels (CausVid,
arXiv:2412.07772, section 4.2).
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffdistill.divergences import masked_mean, mse
from diffdistill.draws import Draws
from diffdistill.errors import UserError
from diffdistill.method import Method
from diffdistill.protocols import Model, StreamingFamily
from diffdistill.readouts import GuidanceForm, clean_of, guided
from diffdistill.schedules import shifted
from diffdistill.types import Batch, Condition, Loss, Progress, State


@dataclass(kw_only=True)
class CausalInit(Method):
    """Teach a student to denoise blocks that do not see the future.

    Attributes:
        family: The model family.
        draws: The random numbers of the run.
        student: The causal model to train.
        teacher: The bidirectional model whose trajectories ``ode`` follows.
        mode: What the student learns from; see above.
        num_steps: Steps of the student, whose noise levels ``ode`` trains at.
        shift: Shift of the noise levels of the two forcing modes; 5 in Self-Forcing's configs.
        num_teacher_steps: Euler steps of a teacher trajectory; 48 in CausVid.
        guidance: Classifier-free guidance of the teacher. 4 is for the form ``standard``; with
            ``guidance_form: extra`` the same is 3.
        guidance_form: ``standard`` (1 = none) or ``extra`` (0 = none).
        num_uses: Losses made of each trajectory, at fresh noise levels; a trajectory costs far
            more than a loss.
    """

    streams: ClassVar = True
    roles: ClassVar = {"student": {"weights": "trained"}, "teacher": {"weights": "frozen"}}

    family: StreamingFamily
    draws: Draws
    student: Model
    teacher: Model
    mode: Literal["teacher-forcing", "diffusion-forcing", "ode"] = "ode"
    num_steps: int = 4
    shift: float = 5.0
    num_teacher_steps: int = 48
    guidance: float = 4.0
    guidance_form: GuidanceForm = "standard"
    num_uses: int = 4

    def needs_images(self) -> bool:
        """Return whether there must be videos to learn from."""
        return self.mode != "ode"

    def check_clip(self, num_frames: int) -> None:
        """Refuse a noised past, which neither its losses nor its samples have.

        Raises:
            UserError: If ``family.context_noise`` is not 0.
        """
        if self.family.context_noise:
            raise UserError(
                "family.context_noise: causal-init has no noised past; set it to 0 here, and for "
                "the method that goes on from its student"
            )

    def losses(self, batch: Batch, progress: Progress) -> Iterator[Loss]:
        """Yield the student's loss, or one for each use of a trajectory."""
        prompt = self.family.condition(batch)
        if self.mode == "ode":
            yield from self._regressions(batch, prompt)
        else:
            yield self._denoising(batch, prompt)

    def _denoising(self, batch: Batch, prompt: Condition) -> Loss:
        """Return the flow-matching loss with one noise level per block."""
        video = self.family.clean(batch)
        level = torch.stack(
            [self.draws.uniform(f"time/{b}", batch["ids"]) for b in range(self._blocks(video))], 1
        )
        t = self._per_frame(shifted(level, self.shift))
        noise = self.draws.normal("noise", batch["ids"], video.shape[1:])
        told = self.family.causal(
            prompt, video.shape[2], clean=video if self.mode == "teacher-forcing" else None
        )
        velocity = self.student(self.family.noise(video, t, noise), told)
        return Loss("student", masked_mean(mse(velocity, noise - video)), len(video))

    def _regressions(self, batch: Batch, prompt: Condition) -> Iterator[Loss]:
        states, end = self._trajectory(batch, prompt)
        told = self.family.causal(prompt, end.shape[2])
        levels = self.family.grid(self.num_steps, end.shape[1:]).to(end.device)
        for use in range(self.num_uses):
            state = self._mixed(batch, states, levels, use)
            value = masked_mean(mse(clean_of(state, self.student(state, told)), end))
            yield Loss("student", value, len(end), more=use + 1 < self.num_uses)

    @torch.no_grad()
    def _trajectory(self, batch: Batch, prompt: Condition) -> tuple[Tensor, Tensor]:
        """Return the teacher's states at the student's levels ``[num_steps, B, ...]``, its end.

        The student's levels are inserted into the teacher's grid, so that no state is
        interpolated.
        """
        shape = self.family.latent_shape(batch)
        x = self.draws.normal("rollout", batch["ids"], shape)
        negative = self.family.condition(batch, negative=True)
        wanted = self.family.grid(self.num_steps, shape).tolist()[:-1]
        fine = self.family.grid(self.num_teacher_steps, shape).tolist()
        grid = sorted({*wanted, *fine}, reverse=True)
        states = []
        for now, after in itertools.pairwise(grid):
            if now in wanted:
                states.append(x)
            state = State(x, torch.full((len(x),), now, device=x.device))
            x = x + (after - now) * self._guided(state, prompt, negative)
        return torch.stack(states), x

    def _guided(self, state: State, prompt: Condition, negative: Condition) -> Tensor:
        """Return the teacher's guided velocity; one call where the guidance is neutral."""
        positive = self.teacher(state, prompt)
        if self.guidance == (1.0 if self.guidance_form == "standard" else 0.0):
            return positive
        return guided(positive, self.teacher(state, negative), self.guidance, self.guidance_form)

    def _mixed(self, batch: Batch, states: Tensor, levels: Tensor, use: int) -> State:
        """Return a clip whose blocks are at random levels of the trajectory."""
        frames = []
        chosen = []
        for block in range(self._blocks(states[0])):
            uniform = self.draws.uniform(f"level/{use}/{block}", batch["ids"])
            index = (uniform * self.num_steps).long().clamp(max=self.num_steps - 1)
            part = slice(block * self.family.block_frames, (block + 1) * self.family.block_frames)
            frames.append(states[index, torch.arange(len(index), device=index.device)][:, :, part])
            chosen.append(levels[index])
        return State(torch.cat(frames, dim=2), self._per_frame(torch.stack(chosen, dim=1)))

    def _blocks(self, video: Tensor) -> int:
        return video.shape[2] // self.family.block_frames

    def _per_frame(self, levels: Tensor) -> Tensor:
        """Return levels ``[B, F]`` of blocks' ``[B, blocks]``."""
        return levels.repeat_interleave(self.family.block_frames, dim=1)
