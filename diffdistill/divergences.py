"""Unreduced maps of how far the student is from the teacher, and the one reducer.

Every divergence takes (student, teacher), detaches the teacher and returns a map, float32.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
Normalizer = Literal["sample", "batch"]


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of two tensors of one shape, as a map of that shape."""
    return (student.float() - teacher.detach().float()).square()


@torch.no_grad()
def matching_direction(
    sample: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    epsilon: float = 0.0,
    normalizer: Normalizer = "sample",
) -> Tensor:
    """Return DMD's gradient ``g`` in ``sample``, a constant ``[B, ...]``.

    Eq. 7 and 8 of DMD (arXiv:2311.18828) in x0 space, as its later codes compute it:
    ``(fake - real) / mean(abs(sample - real))`` per sample. Entries that are not finite (0 / 0)
    count as 0.

    Args:
        sample: The student's clean sample ``[B, ...]``.
        real: The (guided) teacher's clean prediction at the re-noised sample, same shape.
        fake: The critic's clean prediction there, same shape.
        epsilon: Added to the normalizer. 0 in DMD2 and Self-Forcing, 1e-6 in FastGen.
        normalizer: ``sample`` takes the mean in g over each sample (DMD2, Self-Forcing,
            FastGen), ``batch`` over all samples at hand (FastVideo).
    """
    dims = tuple(range(1 if normalizer == "sample" else 0, sample.ndim))
    scale = (sample - real).abs().mean(dim=dims, keepdim=True) + epsilon
    return torch.nan_to_num((fake - real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def along(sample: Tensor, direction: Tensor) -> Tensor:
    """Return the map ``0.5 (sample - stopgrad(sample - g))^2``, whose gradient is ``g``."""
    return 0.5 * (sample - (sample - direction).detach()).square()


def masked_mean(error: Tensor, mask: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Return the mean of ``error`` as a scalar.

    Args:
        error: A map of any shape.
        mask: bool, broadcastable to ``error``: chooses, and enters the denominator.
        weight: float, broadcastable to ``error``: scales, and does not enter the denominator.
    """
    if weight is not None:
        error = error * weight
    if mask is None:
        return error.mean()
    mask = mask.expand_as(error)
    return torch.where(mask, error, torch.zeros_like(error)).sum() / mask.sum().clamp(min=1)


def softplus_gan(real: Tensor, fake: Tensor) -> Tensor:
    """Return the non-saturating discriminator loss ``[B]`` of logits ``[B]``.

    softplus(-real) + softplus(fake), section 4.3 of DMD2 (arXiv:2405.14867).
    """
    softplus = torch.nn.functional.softplus
    return softplus(-real.float()) + softplus(fake.float())
