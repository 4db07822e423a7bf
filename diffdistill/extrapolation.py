"""How far a target may go beyond the teacher, away from a reference model.

G-OPD (arXiv:2602.12125): the target ``q`` is proportional to ``reference^(1 - s) teacher^s`` with
strength s; 1 is the teacher, ExOPD has 1.25. Where the teacher is nearly sure of a token (a brace
of JSON), too large a strength leaves next to nothing for all others, and formats collapse: the
Extrapolation Cliff (arXiv:2605.08737). Its abstract has a critical strength in closed form of p,
b and the clip strength c of importance sampling. We could not read the theorem: how the smallest
safe tail follows from c is not known here, and every ``TailFloor`` below is ours.

p is the probability of the token that the teacher finds most likely, b that of the same token
under the reference; both are given as log-probabilities, so that ``1 - p`` is exact near 0.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffdistill.types import Progress

TailFloor = Callable[[Tensor, Tensor], Tensor]
"""From the log-probabilities p and b ``[...]``, the log of the least that the target must leave
for all other tokens ``[...]``."""


class Mode(NamedTuple):
    """The teacher's most likely token at each position.

    Attributes:
        teacher: Its log-probability under the teacher (p), ``[...]``.
        reference: Its log-probability under the reference (b), ``[...]``.
        same: Whether it is the reference's most likely token too, bool ``[...]``.
    """

    teacher: Tensor
    reference: Tensor
    same: Tensor


@torch.no_grad()
def mode_of(teacher: Tensor, reference: Tensor) -> Mode:
    """Return the teacher's most likely tokens ``[...]`` of log-probabilities ``[..., V]``."""
    best, token = teacher.max(dim=-1)
    other = reference.gather(-1, token[..., None]).squeeze(-1)
    return Mode(best, other, reference.argmax(dim=-1) == token)


@torch.no_grad()
def contract_positions(teacher: Tensor, same: Tensor, *, p_min: float = 0.9) -> Tensor:
    """Return where the format leaves no choice, bool ``[...]``.

    Ours: the teacher gives its most likely token at least ``p_min``, and the reference agrees
    which it is. ``teacher`` and ``same`` are those of ``Mode``.
    """
    return same & (teacher >= math.log(p_min))


@torch.no_grad()
def fixed_point(teacher: Tensor, reference: Tensor, strength: Tensor | float) -> Tensor:
    """Return the log-probability ``[...]`` of the teacher's token under the target.

    ``logit q = logit b + s (logit p - logit b)``: where all other tokens are one, exact algebra
    of G-OPD's optimum (ours; the Cliff's abstract reduces to the same Bernoulli variable).
    """
    ours, theirs = _logit(reference), _logit(teacher)
    gap = torch.where(ours == theirs, 0.0, theirs - ours)
    return torch.nn.functional.logsigmoid(ours + strength * gap)


def teacher_relative_floor(kappa: float = 2.0) -> TailFloor:
    """Return the tail floor ``(1 - p) / kappa``: the tail may shrink to that share of it (ours).

    The critical strength then is at least 1, and about ``1 + ln(kappa) / (logit p - logit b)``.
    The page of the Cliff reports 1.22, which is a kappa of 1.9 to 2.7 for p of .95 to .99 and b
    of 1/2.

    Raises:
        ValueError: If kappa is below 1: then the teacher itself would not be safe.
    """
    if not kappa >= 1.0:
        raise ValueError(f"kappa must be at least 1, not {kappa}")
    return lambda teacher, reference: _log_complement(teacher) - math.log(kappa)


def constant_floor(tau: float) -> TailFloor:
    """Return the tail floor ``tau`` at every position (ours).

    Raises:
        ValueError: If tau is not in (0, 1).
    """
    if not 0.0 < tau < 1.0:
        raise ValueError(f"the tail floor must be in (0, 1), not {tau}")
    return lambda teacher, reference: torch.full_like(teacher, math.log(tau))


@torch.no_grad()
def critical_strength(teacher: Tensor, reference: Tensor, tail_floor: TailFloor) -> Tensor:
    """Return the strength ``[...]`` at which the target's tail reaches its floor.

    ``[logit(1 - tau) - logit b] / [logit p - logit b]`` where p > b, by ``fixed_point`` (ours; of
    the form of the Cliff's threshold, whose tau is not known here). It may be below 1, or
    negative, where the teacher itself leaves less than the floor. Infinite where p <= b: there
    the tail does not shrink as the strength grows. Where p is 1 or b is 0 in floating point and
    the quotient is not defined, 1, its limit for a floor that falls with ``1 - p``.
    """
    teacher, reference = _wide(teacher), _wide(reference)
    ours, theirs = _logit(reference), _logit(teacher)
    bound = -_logit(tail_floor(teacher, reference))
    quotient = ((bound - ours) / (theirs - ours)).nan_to_num(
        nan=1.0, posinf=math.inf, neginf=-math.inf
    )
    return torch.where(theirs > ours, quotient, math.inf)


def base_neutral_strength(teacher: Tensor, tau: float) -> Tensor:
    """Return ``logit(1 - tau) / logit p`` ``[...]``, the critical strength at b = 1/2.

    The Cliff's page calls its 1.22 base-neutral, a function of p and c only; that this means
    b = 1/2 is our reading. Infinite where p <= 1/2.
    """
    half = torch.full_like(_wide(teacher), math.log(0.5))
    return critical_strength(teacher, half, constant_floor(tau))


@torch.no_grad()
def guarded_strength(
    requested: Tensor | float,
    teacher: Tensor,
    reference: Tensor,
    contract: Tensor,
    *,
    tail_floor: TailFloor,
    margin: float = 0.03,
) -> Tensor:
    """Return the strength ``[...]`` to use at each position, never above the requested one.

    As requested, except at contract positions: there at most ``1 - margin`` of the critical
    strength, but not below 1 if 1 or more was requested (ours; the Cliff advises to stay below
    the boundary). Where p <= b it is 1, for a larger strength would make the token less likely.

    Args:
        requested: The strength wanted, a number or ``[...]``.
        teacher: Log-probabilities p, ``[...]``.
        reference: Log-probabilities b, ``[...]``.
        contract: Where to guard, bool ``[...]`` (``contract_positions``).
        tail_floor: What the target must leave for other tokens.
        margin: How far below the critical strength to stay, as a share of it.
    """
    wanted = torch.as_tensor(requested, dtype=_wide(teacher).dtype, device=teacher.device)
    safe = (1.0 - margin) * critical_strength(teacher, reference, tail_floor)
    safe = torch.where(teacher > reference, safe, 1.0)
    guarded = torch.minimum(wanted, safe.clamp(min=1.0))
    return torch.where(contract, guarded, wanted)


def beta_opsd_strength(
    progress: Progress, *, start: float = 0.5, end: float = 0.8, steps: int = 200
) -> float:
    """Return beta-OPSD's strength ``w = 1 / beta``, which rises linearly from start to end.

    Eq. 10 and 22 of arXiv:2607.28582 with its K = 200 steps: the half of the axis below 1, where
    the reference is the student itself. That step 0 has ``start`` and step K ``end`` is ours.
    """
    return start + (end - start) * min(progress.step / steps, 1.0)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _log_complement(logprob: Tensor) -> Tensor:
    """Return ``log(1 - exp(logprob))``, exact where the probability is near 1."""
    return torch.log(-torch.expm1(_wide(logprob).clamp(max=0.0)))


def _logit(logprob: Tensor) -> Tensor:
    return _wide(logprob).clamp(max=0.0) - _log_complement(logprob)
