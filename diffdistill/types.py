"""The values that pass through a training step.

States are named tuples of tensors, so that torch treats them as pytrees.

Shape letters used in this package:
    B batch, C channels, F frames, H height, W width, L tokens, V vocabulary, N chunks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

Batch: TypeAlias = Mapping[str, Any]
"""One collated micro-batch. ``ids`` (int64 ``[B]``, one number per draw of the whole run, see
``draws``) and ``prompts`` are always there; only a family reads the other keys."""

Condition: TypeAlias = Mapping[str, Any]
"""What a model is told besides the state. Only the family that made it reads its keys."""


class Example(NamedTuple):
    """One item of a data set.

    Attributes:
        prompt: The caption.
        image: Target pixels ``[3, H, W]`` in [0, 1], or None for data of prompts only.
        references: Source images of an editing pair, each ``[3, H, W]`` in [0, 1].
        detailed_prompt: A longer caption for the ``detailed-prompt`` view.
        size: ``(H, W)`` in pixels of what to generate, where there is no image.
        origin: Where it came from ("file:line"), for messages.
    """

    prompt: str
    image: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    detailed_prompt: str | None = None
    size: tuple[int, int] | None = None
    origin: str = ""


class State(NamedTuple):
    """Where a model is asked for a prediction.

    Attributes:
        x: Latents ``[B, C, H, W]`` or ``[B, C, F, H, W]``, or token ids ``[B, L]``.
        t: Noise level ``[B]`` in [0, 1]: 0 is data, 1 is pure noise (or every token masked).
        mask: True where the loss counts, ``[B, L]``. None means everywhere.
    """

    x: Tensor
    t: Tensor
    mask: Tensor | None = None


class Progress(NamedTuple):
    """How far training has come."""

    step: int
    total: int

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
