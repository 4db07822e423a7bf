"""What every latent flow-matching family shares: time, noise and the sampling walk."""

from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffdistill.pipelines.model_family import ModelFamily
from diffdistill.protocols import Model
from diffdistill.readouts import clean_of, per_sample
from diffdistill.types import Batch, Condition, Example, State


class FlowFamily(ModelFamily):
    """A family on the straight path ``x_t = (1 - t) data + t noise``.

    Attributes:
        views: Names of the privileged views the family has, for exposure 1.
    """

    views: ClassVar[tuple[str, ...]]

    @abstractmethod
    def predict(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return the velocity ``noise - data`` of ``network``, with the shape of ``state.x``."""

    @abstractmethod
    def features(self, network: nn.Module, state: State, condition: Condition) -> Tensor:
        """Return features ``[B, N, D]`` of the latents' tokens from the middle of ``network``."""

    @abstractmethod
    def encode(
        self, examples: Sequence[Example], *, privileged: bool = True
    ) -> list[dict[str, Tensor]]:
        """Return, for each example, all tensors that training needs of it (cacheable).

        ``latents`` ``[C, H, W]`` or ``[C, F, H, W]`` is always among them: zeros of the right
        shape for an example that has a ``size`` instead of a target (such zeros may be views of
        one number). ``privileged=False`` leaves out what only
        exposure 1 shows, and asks the examples for nothing of it; enough for sampling.
        """

    @abstractmethod
    def collate(self, encoded: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
        """Return a batch on the device, of what ``encode`` returned for its examples."""

    @abstractmethod
    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return what a model is told about ``batch`` (see ``protocols.Family``)."""

    @abstractmethod
    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels ``[num_steps + 1]`` for latents of ``shape``, from 1 to 0."""

    @abstractmethod
    def decode(self, sample: Tensor) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` or ``[B, T, 3, H, W]`` in [0, 1] for latents."""

    def check_clip(self, num_frames: int) -> None:
        """Refuse clips of so many pixel frames that the model cannot make.

        Raises:
            UserError: If it cannot.
        """

    def release(self) -> None:
        """Take encoders and decoder off the device until they are needed again."""

    @abstractmethod
    def fingerprint(self) -> str:
        """Return what identifies the encoders and their options, for cache keys."""

    def clean(self, batch: Batch) -> Tensor:
        """Return the data of ``batch`` as float32 latents ``[B, C, (F,) H, W]``."""
        latents: Tensor = batch["latents"]
        return latents.float()

    def latent_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of one sample's latents, ``(C, H, W)`` or ``(C, F, H, W)``."""
        return tuple(batch["latents"].shape[1:])

    def noise(self, clean: Tensor, t: Tensor, noise: Tensor) -> State:
        """Return the state at noise level ``t`` between ``clean`` and ``noise``.

        ``t`` is ``[B]``, or ``[B, F]`` where the frames of ``[B, C, F, H, W]`` differ in it.
        """
        share = per_sample(t, clean)
        return State((1.0 - share) * clean + share * noise, t)

    def walk(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Iterator[tuple[State, Tensor]]:
        """Yield each state of the student's sampling with its prediction (see ``protocols``)."""
        grid = self.grid(num_steps, noise.shape[1:]).tolist()
        x = noise
        for index in range(num_steps):
            t = torch.full((len(x),), grid[index], device=x.device)
            state = State(x, t)
            velocity = student(state, condition)
            yield state, velocity
            with torch.no_grad():
                x = self.advance(state, velocity, grid, index, renoise)

    def advance(
        self,
        state: State,
        velocity: Tensor,
        grid: Sequence[float],
        index: int,
        renoise: Callable[[int], Tensor] | None,
    ) -> Tensor:
        """Return ``x`` at level ``index + 1`` of ``grid``, from ``state`` at level ``index``."""
        now, after = grid[index], grid[index + 1]
        if renoise is None:
            return state.x + (after - now) * velocity.detach()
        clean = clean_of(state, velocity.detach())
        return (1.0 - after) * clean + after * renoise(index)

    @torch.no_grad()
    def sample(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Return clean latents like ``noise``; by default as the family's pipeline samples."""
        walk = self.walk(student, condition, noise, num_steps=num_steps, renoise=renoise)
        [(state, velocity)] = deque(walk, maxlen=1)
        return clean_of(state, velocity)
