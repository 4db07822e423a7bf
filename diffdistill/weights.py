"""Detached factors that scale a loss map."""

from typing import Literal

import torch
from torch import Tensor

VelocityWeight = Literal["uniform", "sigma2"]


def velocity_weight(t: Tensor, kind: VelocityWeight) -> Tensor:
    """Return the factor ``[B]`` of a velocity error at noise level ``t`` ``[B]``.

    ``uniform`` is 1 (eq. 7 of D-OPSD, arXiv:2605.05204). ``sigma2`` is t squared: since both
    sides share the state, it equals the error of the clean predictions, which the authors'
    released scripts optimize.
    """
    return torch.ones_like(t) if kind == "uniform" else t.square()


def reliability(score: Tensor, beta: float) -> Tensor:
    """Return the factor ``exp(beta score)`` ``[B]`` of samples with z-scored rewards ``[B]``.

    Stream-R1 and Reward Forcing (beta 2): neither clipped nor normalized over the batch.
    """
    return torch.exp(beta * score)


def weaker_axes(scores: Tensor, temperature: float) -> Tensor:
    """Return shares ``[B, M]`` of M axes, more for an axis with a lower score.

    ``softmax(-scores / temperature)``, from Stream-R1's code (temperature 1).
    """
    return torch.softmax(-scores / temperature, dim=-1)


NoiseWeight = Literal["uniform", "midrange"]


def noise_weight(t: Tensor, kind: NoiseWeight) -> Tensor:
    """Return the factor ``[B]`` of a distillation error at noise level ``t`` ``[B]``.

    ``uniform`` is 1. ``midrange`` is ``exp(-(t - 0.5)^2 / (2 0.15^2))``, from the code of TIDE
    (arXiv:2604.26951); 1 at t = 0.5, and not normalized.
    """
    if kind == "uniform":
        return torch.ones_like(t)
    return torch.exp(-(t - 0.5).square() / (2.0 * 0.15**2))
