"""Functions of training progress and of the noise level."""

import math
from typing import Literal

import torch
from torch import Tensor

LearningRateSchedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    update: int, total: int, *, kind: LearningRateSchedule = "constant", warmup: int = 0
) -> float:
    """Return what the learning rate is multiplied with at one optimizer update.

    Args:
        update: Updates made so far, from 0.
        total: Updates of the whole run.
        kind: After the warm-up: constant, or falling to 0 at ``total``.
        warmup: Updates over which the factor rises linearly from ``1 / (warmup + 1)``.
    """
    if update < warmup:
        return (update + 1) / (warmup + 1)
    fraction = min((update - warmup) / max(total - warmup, 1), 1.0)
    if kind == "linear":
        return 1.0 - fraction
    if kind == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * fraction))
    return 1.0


def shifted(t: Tensor, shift: float) -> Tensor:
    """Return noise levels moved towards noise: ``s t / (1 + (s - 1) t)``, 1 = unchanged.

    Eq. 23 of Stable Diffusion 3 (arXiv:2403.03206), the flow schedulers' ``shift``.
    """
    return shift * t / (1.0 + (shift - 1.0) * t)


def score_time(uniform: Tensor, *, shift: float, low: float, high: float) -> Tensor:
    """Return noise levels ``[B]`` for score matching from uniform numbers ``[B]`` in [0, 1).

    Uniform, then shifted, then clamped to [low, high], in the order of Self-Forcing's code
    (shift 5, [0.02, 0.98]). DMD2's SDXL code draws uniformly in the range instead, which at
    shift 1 differs only by the mass at its ends.
    """
    return shifted(uniform, shift).clamp(low, high)


def logit_normal_time(normal: Tensor, *, mean: float, std: float) -> Tensor:
    """Return noise levels ``[B]`` in (0, 1) from standard normal numbers ``[B]``.

    The logit-normal density of section 3.1 of arXiv:2403.03206.
    """
    return torch.sigmoid(mean + std * normal)


TidalAxes = Literal["both", "training", "noise"]
TidalGrowth = Literal["cosine", "linear"]


def tidal_rate(
    progress: float,
    t: Tensor,
    *,
    start: float = 0.1,
    end: float = 0.9,
    axes: TidalAxes = "both",
    growth: TidalGrowth = "cosine",
) -> Tensor:
    """Return the teacher's share ``[B]`` of TIDAL's target at noise level ``t`` ``[B]``.

    Eq. 1 and 2 of TIDE (arXiv:2604.26951): it rises with training, from ``start`` to ``end``, and
    falls as more of the text is hidden, ``rate(progress) (1 - t)``.

    Args:
        progress: The share of training done, in [0, 1].
        t: The noise level.
        start: The share at the start of training, before the factor of the noise.
        end: The share at the end.
        axes: ``both``; ``training`` is ``rate(progress)`` for every t (the paper's ablation
            without the timestep axis); ``noise`` is ``end (1 - t)`` throughout (the one without
            the training axis).
        growth: ``cosine``, ``(1 - cos(pi progress)) / 2`` (paper), or ``linear`` (code).
    """
    grown = progress if growth == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    rate = end if axes == "noise" else start + (end - start) * grown
    return rate * (torch.ones_like(t) if axes == "training" else 1.0 - t)
