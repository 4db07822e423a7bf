"""Predictions in the space where student and teacher are compared."""

from typing import Literal

from torch import Tensor

from diffdistill.protocols import Model
from diffdistill.types import Condition, State

GuidanceForm = Literal["standard", "extra"]


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return ``values`` with axes of size 1, to broadcast over ``like``.

    ``[B]`` belongs to the first axis of ``like``, ``[B, F]`` to the first and third of
    ``[B, C, F, H, W]``.
    """
    if values.ndim == 2:
        return values[:, None, :, None, None]
    return values.reshape(-1, *(1 for _ in range(like.ndim - 1)))


def clean_of(state: State, velocity: Tensor) -> Tensor:
    """Return the clean sample that ``velocity`` implies at ``state``: ``x - t v``."""
    return state.x - per_sample(state.t, state.x) * velocity


def clean(model: Model, state: State, condition: Condition) -> Tensor:
    """Return the model's clean prediction at ``state``, with the shape of ``state.x``."""
    return clean_of(state, model(state, condition))


def guided(positive: Tensor, negative: Tensor, scale: float, form: GuidanceForm) -> Tensor:
    """Return classifier-free guidance of two predictions.

    Args:
        positive: The prediction under the prompt.
        negative: The prediction under the negative prompt.
        scale: The guidance.
        form: ``standard`` is ``negative + scale (positive - negative)``, 1 = none (DMD2,
            FastVideo, rCM; FastGen's form equals it). ``extra`` is
            ``positive + scale (positive - negative)``, 0 = none (Self-Forcing, CausVid);
            ``extra`` at s equals ``standard`` at s + 1.
    """
    scale = scale if form == "standard" else scale + 1.0
    return negative + scale * (positive - negative)


def guided_clean(
    model: Model,
    state: State,
    condition: Condition,
    negative: Condition,
    *,
    scale: float,
    form: GuidanceForm = "standard",
) -> Tensor:
    """Return the guided clean prediction; one model call where the guidance is neutral."""
    neutral = 1.0 if form == "standard" else 0.0
    positive = model(state, condition)
    if scale == neutral:
        return clean_of(state, positive)
    return clean_of(state, guided(positive, model(state, negative), scale, form))
