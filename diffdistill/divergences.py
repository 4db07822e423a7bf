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


CHUNK_EPSILON = 1e-7
"""How far chunk probabilities stay from 0 and 1 (TIDE's code); a logit is at most 16.118."""


def total_variation(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the total variation distance of the softmax of logits, ``[...]``, in [0, 1].

    Half the L1 distance of the probabilities, a loss of SDTT (arXiv:2410.21035). Its code has
    the L1 distance of the log-probabilities under this name.
    """
    ours, theirs = _log_softmax(student, teacher)
    return 0.5 * (ours.exp() - theirs.exp()).abs().sum(dim=-1)


def logprob_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared error of log-probabilities, a mean over the vocabulary, ``[...]``.

    The mean squared error of SDTT, in its code. Tokens that are impossible to both count 0.
    """
    ours, theirs = _log_softmax(student, teacher)
    return (ours - theirs).nan_to_num(nan=0.0).square().mean(dim=-1)


@torch.no_grad()
def tidal_probability(student: Tensor, teacher: Tensor, rate: Tensor) -> Tensor:
    """Return the target between two chunk probabilities, a constant, clamped as they are.

    Eq. 10 of TIDE: ``(1 - rate) student + rate teacher``.
    """
    mixed = torch.lerp(student.float(), teacher.float(), rate.float().expand_as(student))
    return mixed.clamp(CHUNK_EPSILON, 1.0 - CHUNK_EPSILON)


def chunk_probability(logprob: Tensor, temperature: float) -> Tensor:
    """Return ``exp(logprob / T)`` of chunk log-likelihoods, clamped away from 0 and 1, float32.

    Eq. 9 of TIDE. Where it is clamped there is no gradient (see ``chunk_clamped``).
    """
    return (logprob.float() / temperature).exp().clamp(CHUNK_EPSILON, 1.0 - CHUNK_EPSILON)


@torch.no_grad()
def chunk_clamped(logprob: Tensor, temperature: float) -> Tensor:
    """Return where ``chunk_probability`` is clamped, bool: these chunks teach nothing."""
    probability = (logprob.float() / temperature).exp()
    return (probability < CHUNK_EPSILON) | (probability > 1.0 - CHUNK_EPSILON)


def calm(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of binary events, from the teacher's side, as a map.

    ``-[p log s + (1 - p) log(1 - s)]`` of chunk probabilities s (student) and p: CALM, eq. 9 of
    TIDE. Least at s = p. In the log-likelihood its gradient is bounded as s falls to 0, and
    unbounded as s rises to 1.
    """
    teacher = teacher.detach()
    return -(teacher * student.log() + (1.0 - teacher) * torch.log1p(-student))


def reverse_calm(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the cross-entropy of binary events, from the student's side, as a map.

    ``-[s log p + (1 - s) log(1 - p)]``: Reverse CALM, eq. 11 of TIDE, as published. It is linear
    in s: least at s = 0 where p < 1/2 and at s = 1 where p > 1/2, and not at s = p. It is not
    ``reverse_binary_kl`` up to a constant: what it leaves out, the student's own entropy,
    depends on the student. Its slope is at most 16.118.
    """
    teacher = teacher.detach()
    return -(student * teacher.log() + (1.0 - student) * torch.log1p(-teacher))


def reverse_binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Return KL(student || teacher) of binary events, as a map; least at s = p.

    ``s log(s / p) + (1 - s) log((1 - s) / (1 - p))``, a mode of tokenkit's ALM
    (arXiv:2503.20083); TIDE does not use it.
    """
    entropy = -(student * student.log() + (1.0 - student) * torch.log1p(-student))
    return reverse_calm(student, teacher) - entropy


def _log_softmax(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    ours = torch.log_softmax(student.float(), dim=-1)
    return ours, torch.log_softmax(teacher.detach().float(), dim=-1)
