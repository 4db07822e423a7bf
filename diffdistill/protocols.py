"""What a method may ask of a model, a model family and a reward."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from diffdistill.types import Batch, BlockRollout, Condition, State


class Model(Protocol):
    """A network behind one call, in one parameterization per kind of state.

    Returns the velocity ``d x / d t = noise - data``, float32, with the shape of ``state.x``
    for latents, and logits ``[B, L, V]`` for token ids, aligned so that ``logits[:, i]``
    predicts ``state.x[:, i]``.
    """

    def __call__(self, state: State, condition: Condition) -> Tensor:
        """Return the prediction at ``state`` under ``condition``."""
        ...


class Discriminator(Model, Protocol):
    """A model with a classifier head on its features, for adversarial terms."""

    def discriminate(self, state: State, condition: Condition) -> Tensor:
        """Return one logit per sample, ``[B]``: positive where ``state`` looks like noised data."""
        ...


class Family(Protocol):
    """One model family: how it is conditioned, noised and walked."""

    def condition(
        self, batch: Batch, *, exposure: float = 0.0, negative: bool = False
    ) -> Condition:
        """Return what a model is told about ``batch``.

        Args:
            batch: The collated batch.
            exposure: Share of the privileged context (target image, reference solution) to
                show, in [0, 1]. 0 is what the student sees at inference.
            negative: Return the negative (empty) prompt for guidance instead.
        """
        ...

    def clean(self, batch: Batch) -> Tensor:
        """Return the data of ``batch`` as float32 latents ``[B, C, H, W]``."""
        ...

    def latent_shape(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of one sample's latents, ``(C, H, W)``."""
        ...

    def grid(self, num_steps: int, shape: Sequence[int]) -> Tensor:
        """Return the noise levels ``[num_steps + 1]`` of few-step sampling, from 1 down to 0."""
        ...

    def noise(self, clean: Tensor, t: Tensor, noise: Tensor) -> State:
        """Return the state at noise level ``t`` ``[B]`` between ``clean`` and ``noise``."""
        ...

    def walk(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        renoise: Callable[[int], Tensor] | None = None,
    ) -> Iterator[tuple[State, Tensor]]:
        """Yield each state of the student's own sampling, with its prediction there.

        The prediction carries the student's graph (if gradients are enabled at that moment);
        the walk goes on from a detached copy, so one graph is alive at a time.

        Args:
            student: The model that acts.
            condition: What it is told.
            noise: The initial noise, ``[B, C, H, W]``.
            num_steps: Number of model calls.
            renoise: None takes Euler steps along the velocity (as the pipelines do). A
                function of the step index returns fresh noise to re-noise the predicted
                clean sample with (the stochastic sampler of consistency models and DMD2).
        """
        ...

    def decode(self, sample: Tensor) -> Tensor:
        """Return pixels ``[B, 3, H, W]`` in [0, 1] for latents."""
        ...


class StreamingFamily(Family, Protocol):
    """A video family whose student streams blocks of latent frames over a cache of its past."""

    block_frames: int
    context_noise: float

    def num_latent_frames(self, num_frames: int) -> int:
        """Return the latent frames of so many pixel frames."""
        ...

    def causal(
        self, condition: Condition, num_frames: int, *, clean: Tensor | None = None
    ) -> Condition:
        """Return ``condition`` for one call on a whole clip whose blocks see no later block.

        With ``clean`` (the clip, ``[B, C, F, H, W]``) they see the past without its noise.
        """
        ...

    def rollout(
        self,
        student: Model,
        condition: Condition,
        noise: Tensor,
        *,
        num_steps: int,
        exits: Sequence[int],
        renoise: Callable[[int, int], Tensor] | None,
        graph_from: int | None = None,
        keep_calls: bool = True,
    ) -> BlockRollout:
        """Return a clip that the student streamed from ``noise`` ``[B, C, F, H, W]``.

        Args:
            student: The model that acts.
            condition: What it is told.
            noise: The initial noise; F is a multiple of the block.
            num_steps: Steps of the sampling grid.
            exits: For each block, the step whose clean prediction is taken.
            renoise: Fresh noise for (block, step); None takes Euler steps.
            graph_from: First block whose last call keeps its graph; None keeps none.
            keep_calls: Whether to return the blocks' last calls, with their cached past.
        """
        ...

    def reencoded(self, stream: Tensor) -> Tensor:
        """Return the last frame of latents ``[B, C, F, H, W]``, encoded as a first frame."""
        ...


class Judgment(NamedTuple):
    """What a reward says of finished samples; all constants.

    Attributes:
        scores: The z-score ``[B]`` of each axis.
        saliency: How sensitive the raw score of each axis is to each place,
            ``[B, T', H', W']``; empty where it was not asked for.
    """

    scores: Mapping[str, Tensor]
    saliency: Mapping[str, Tensor]


class Reward(Protocol):
    """A differentiable judge of finished samples, in one or more axes."""

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the scores, such as ``("visual", "motion", "text")``."""
        ...

    def score(self, pixels: Tensor, prompts: Sequence[str]) -> Mapping[str, Tensor]:
        """Return the raw score ``[B]`` of each axis of videos ``[B, T, 3, H, W]`` in [0, 1]."""
        ...

    def normalized(self, scores: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the z-scores of raw scores."""
        ...

    def saliency(
        self, pixels: Tensor, prompts: Sequence[str], *, micro_batch: int = 1
    ) -> Mapping[str, Tensor]:
        """Return how sensitive each raw score is to each place, ``[B, T', H', W']``."""
        ...

    def judge(
        self,
        pixels: Tensor,
        prompts: Sequence[str],
        *,
        saliency: bool,
        micro_batch: int,
        axes: Sequence[str] | None = None,
    ) -> Judgment:
        """Return z-scores and, if wanted, saliency (of ``axes``), from one forward pass each."""
        ...
