"""The values that pass through a training step.

States are named tuples of tensors, so that torch treats them as pytrees.

Shape letters used in this package:
    B batch, C channels, F frames, H height, W width, L tokens, V vocabulary, N chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]
"""One collated micro-batch. ``ids`` (int64 ``[B]``, one number per draw of the whole run, see
``draws``) and ``prompts`` are always there; only a family reads the other keys."""

Condition: TypeAlias = Mapping[str, Any]
"""What a model is told besides the state. Only the family that made it reads its keys."""


class Picture(Protocol):
    """A picture that is read when it is needed."""

    def image(self) -> Any:
        """Return the RGB image, of Pillow.

        Raises:
            UserError: If it cannot be read.
        """
        ...


class Example(NamedTuple):
    """One item of a data set.

    Attributes:
        prompt: The caption.
        image: Target pixels ``[3, H, W]`` in [0, 1], or None where there is no target image.
        references: Source images of an editing pair, each ``[3, H, W]`` in [0, 1].
        detailed_prompt: A longer caption for the ``detailed-prompt`` view.
        size: ``(H, W)`` in pixels of what to generate, where there is no target.
        origin: Where it came from ("file:line"), for messages.
        video: Target pixels ``[T, 3, H, W]`` in [0, 1], or None where there is no target video.
        num_frames: Pixel frames ``T`` of what to generate, where there is no video.
        messages: A chat: ``role`` and ``content`` of each message.
        text: A plain text.
        solution: Of a question: the worked reference solution, which a teacher may be shown.
        answer: Of a question: the final answer alone, by which answers are verified.
        pictures: Of a question: the pictures that it is about.
        skill: Of a question: which of ``data.skills`` it is of; None where there are none.
    """

    prompt: str
    image: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    detailed_prompt: str | None = None
    size: tuple[int, int] | None = None
    origin: str = ""
    video: Tensor | None = None
    num_frames: int | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    text: str | None = None
    solution: str | None = None
    answer: str | None = None
    pictures: tuple[Picture, ...] = ()
    skill: str | None = None

    def without_target(self) -> "Example":
        """Return what a student may see of it: size and frames in place of image or video."""
        if self.image is None and self.video is None:
            return self
        target = self.image if self.video is None else self.video
        assert target is not None
        num_frames = None if self.video is None else len(self.video)
        size = (target.shape[-2], target.shape[-1])
        return self._replace(image=None, video=None, size=size, num_frames=num_frames)


class State(NamedTuple):
    """Where a model is asked for a prediction.

    Attributes:
        x: Latents ``[B, C, H, W]`` or ``[B, C, F, H, W]``, or token ids ``[B, L]``.
        t: Noise level ``[B]`` in [0, 1]: 0 is data, 1 is pure noise (or every token masked).
            ``[B, F]`` where the frames of ``x`` differ in it.
        mask: True where the loss counts, ``[B, L]``. None means everywhere.
    """

    x: Tensor
    t: Tensor
    mask: Tensor | None = None


class ModelCall(NamedTuple):
    """What a model was asked, so that it can be asked again."""

    state: State
    condition: Condition


class BlockRollout(NamedTuple):
    """A clip that a student streamed, block after block.

    Attributes:
        sample: Clean latents ``[B, C, F, H, W]``, with the graph of the calls that kept one.
        calls: For each block, the call whose clean prediction is its part of ``sample``; empty
            where they were not asked for. A call's condition holds the cached past, detached, so
            that the call alone gives the block's gradient.
    """

    sample: Tensor
    calls: list[ModelCall]


class Progress(NamedTuple):
    """How far training has come.

    Attributes:
        step: Optimizer steps taken.
        total: Those of the whole run.
        counts: What ``Method.counts`` comes to over all micro-batches and ranks of this step.
        pools: What ``Method.survey`` returned of all micro-batches and ranks of this step.
        part: Which part of the batch's losses is asked for (see ``Method.parts``).
        parts: Of so many.
    """

    step: int
    total: int
    counts: Mapping[str, float] = {}
    pools: Mapping[str, Tensor] = {}
    part: int = 0
    parts: int = 1

    @property
    def fraction(self) -> float:
        """Return the share of training done, in [0, 1]."""
        return self.step / max(self.total - 1, 1)


@dataclass(frozen=True)
class Loss:
    """One scalar to back-propagate, and the role whose parameters it trains.

    A role descends the *count-weighted mean* of all the losses it is given in one optimizer
    step: over the losses of a batch, over micro-batches and over ranks. To add two terms,
    yield their sum.

    Attributes:
        role: The name of the role.
        value: A scalar mean with a graph.
        count: How many things ``value`` is the mean of (samples, or tokens).
        more: Whether this role gets another loss from the same batch; lets sharded training
            put off the reduction of gradients.
        metrics: Scalars to log, averaged like ``value``.
    """

    role: str
    value: Tensor
    count: float = 1.0
    more: bool = False
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)
