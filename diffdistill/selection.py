"""Which tokens of an answer are worth a loss: TIP (arXiv:2604.14084).

A token matters where the student is unsure, and where it is sure and wrong. Scores are ``[B, A]``,
finite, one per token of an answer, and detached.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from diffdistill.doubles import doubled

Rule = Literal["none", "entropy", "divergence", "soft-or", "q3"]
Scope = Literal["rollout", "micro-batch", "global"]
"""Among which tokens the least and the largest value are looked for: those of one answer, of the
answers at hand, or of a pool that the caller gathered from all of an optimizer step. The paper
clips entropies within a batch, and does not say of the divergence."""

LEAST_WEIGHT = 1e-8
"""Scores below it are drawn as if they were this large; the clamp of the authors' code."""


class Bounds(NamedTuple):
    """Between which values a score is stretched to [0, 1].

    Attributes:
        low: The least value, ``[B, 1]``, or ``[1, 1]`` for all answers.
        high: The largest, or the quantile at which values are clipped.
    """

    low: Tensor
    high: Tensor


@torch.no_grad()
def bounds(
    values: Tensor,
    mask: Tensor,
    scope: Scope,
    *,
    clip_quantile: float | None = None,
    pool: Tensor | None = None,
) -> Bounds:
    """Return the bounds of ``values`` ``[B, A]`` within a scope; not finite where it is empty.

    Args:
        values: One per token.
        mask: bool ``[B, A]``: the tokens.
        scope: Among which tokens.
        clip_quantile: The quantile, linearly interpolated, that takes the place of the largest
            value; None takes the largest.
        pool: For ``global``, the values ``[P]`` of all tokens of the step, in any order.
    """
    if scope == "global":
        assert pool is not None, "global bounds need the values of all tokens"
        values, mask = pool[None], torch.ones_like(pool[None], dtype=torch.bool)
    elif scope == "micro-batch":
        values, mask = values.reshape(1, -1), mask.reshape(1, -1)
    last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
    # One column more, so that there is something to look up where there is no token.
    ordered = pad(values.masked_fill(~mask, torch.inf), (0, 1), value=torch.inf).sort(1).values
    place = doubled(last) * (1.0 if clip_quantile is None else clip_quantile)
    below = ordered.gather(1, place.floor().long().to(values.device))
    above = ordered.gather(1, place.ceil().long().to(values.device))
    high = torch.lerp(below, above, (place - place.floor()).to(values.dtype).to(values.device))
    return Bounds(ordered[:, :1], high)


@torch.no_grad()
def normalized(values: Tensor, bounds: Bounds) -> Tensor:
    """Return ``values`` ``[B, A]`` stretched to [0, 1] and clipped there; 0 where all are alike."""
    span = bounds.high - bounds.low
    return ((values - bounds.low) / torch.where(span > 0, span, 1.0)).clamp(0.0, 1.0)


@torch.no_grad()
def token_scores(
    rule: Rule,
    entropy: Tensor,
    divergence: Tensor,
    opposite: Tensor | None,
    mask: Tensor,
    *,
    scope: Scope,
    pool_entropy: Tensor | None = None,
    pool_divergence: Tensor | None = None,
    clip_quantile: float | None = 0.98,
    divergence_clip_quantile: float | None = None,
) -> Tensor:
    """Return how much each token matters, ``[B, A]``, not negative; no matter outside of the mask.

    With h and d for entropy and divergence stretched to [0, 1]: ``entropy`` is h, ``soft-or`` is
    ``h + d - h d`` (eq. 7), ``q3`` is ``opposite (1 - h)``, for tokens that the student is sure
    of and the teacher is not (section 7.3), ``divergence`` is the divergence itself (appendix
    B.2), and ``none`` is 1: drawn with numbers, a uniform choice, which is our control.

    The paper divides entropies by the logarithm of the vocabulary, which stretching undoes. It
    clips entropies and not divergences, so that one huge divergence flattens all the others to 0
    and leaves of ``soft-or`` the entropy alone; ``divergence_clip_quantile`` is ours.

    Args:
        rule: The score.
        entropy: Entropy of the student's distribution.
        divergence: KL(student || teacher).
        opposite: KL(teacher || student), for ``q3`` alone.
        mask: bool: the tokens of the answers.
        scope: Among which tokens values are stretched.
        pool_entropy: For ``global``, the entropies ``[P]`` of all tokens of the step.
        pool_divergence: Likewise.
        clip_quantile: Where entropies are clipped; None does not clip.
        divergence_clip_quantile: Where divergences are clipped.
    """
    if rule == "none":
        return torch.ones_like(entropy)
    if rule == "divergence":
        return divergence.clamp(min=0.0)
    around = bounds(entropy, mask, scope, clip_quantile=clip_quantile, pool=pool_entropy)
    unsure = normalized(entropy, around)
    if rule == "entropy":
        return unsure
    if rule == "q3":
        assert opposite is not None, "q3 needs the divergence seen from the teacher"
        return opposite.clamp(min=0.0) * (1.0 - unsure)
    around = bounds(
        divergence, mask, scope, clip_quantile=divergence_clip_quantile, pool=pool_divergence
    )
    wrong = normalized(divergence, around)
    return unsure + wrong - unsure * wrong


@torch.no_grad()
def select_tokens(
    scores: Tensor, mask: Tensor, retention: float, *, numbers: Tensor | None = None
) -> Tensor:
    """Return the chosen tokens of each answer, bool ``[B, A]``.

    Of an answer of m tokens the ``floor(retention m)`` with the highest scores (eq. 8 of TIP, for
    each rollout), of equal scores the first. At least one of each answer that has any (ours:
    else short answers would teach nothing).

    With ``numbers``, so many are drawn without replacement instead, each in proportion to its
    score among those left (as ``torch.multinomial``, which the authors' code calls). The paper
    draws by entropy itself; give that as the scores, since the clipped one of ``token_scores``
    is not in proportion to it. Either way the chosen tokens are not reweighted, so that their
    mean is not an estimate of the mean over all.

    Args:
        scores: One per token, ``[B, A]``; not negative if they are drawn.
        mask: bool ``[B, A]``: the tokens of the answers.
        retention: The share to keep, in (0, 1].
        numbers: Uniform numbers ``[B, A]`` in [0, 1).
    """
    assert 0.0 < retention <= 1.0, retention
    keys = doubled(scores)
    if numbers is not None:
        # The order in which exponential clocks ring, of rates that are the scores.
        keys = torch.log1p(-doubled(numbers)) / keys.clamp(min=LEAST_WEIGHT)
    keys = keys.masked_fill(~mask.to(keys.device), -torch.inf)
    order = keys.argsort(dim=1, descending=True, stable=True)
    # 0.29 * 100 is a little less than 29.
    kept = (retention * doubled(mask.sum(1, keepdim=True)) + 1e-9).floor().clamp(min=1.0)
    return mask & (order.argsort(dim=1) < kept).to(mask.device)
