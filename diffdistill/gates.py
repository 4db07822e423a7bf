"""Detached factors in (0, 1) of each token's loss, and SDAR's loss that they scale.

SDAR (arXiv:2605.15155), from its code; the two gates that its code lacks are known to us from
other people's notes alone. All take and return maps ``[B, A]``.
"""

import torch
from torch import Tensor


@torch.no_grad()
def gap_gate(teacher_logprob: Tensor, student_logprob: Tensor, beta: float = 5.0) -> Tensor:
    """Return ``sigmoid(beta gap)`` of sampled tokens: near 1 where the teacher likes them more.

    The gap is ``log pT - log pS`` (code, and its beta). Where the two agree the gate is 1/2.
    """
    return torch.sigmoid(beta * (teacher_logprob - student_logprob))


@torch.no_grad()
def entropy_gate(entropy: Tensor, beta: float = 5.0) -> Tensor:
    """Return ``sigmoid(beta h)``, from 1/2 where the student is sure.

    As notes on the paper have it; unconfirmed, as is the beta.

    Args:
        entropy: The student's, divided by the logarithm of the vocabulary, in [0, 1].
        beta: How steep it is.
    """
    return torch.sigmoid(beta * entropy)


@torch.no_grad()
def soft_or_gate(entropy: Tensor, gap: Tensor, beta: float = 5.0) -> Tensor:
    """Return ``sigmoid(beta (1 - (1 - h)(1 - gap)))``: open where either is large.

    As notes on the paper have it, with the raw gap ``log pT - log pS``, which may be far below 0;
    unconfirmed, as is the beta.

    Args:
        entropy: The student's, divided by the logarithm of the vocabulary, in [0, 1].
        gap: The teacher's log-probability minus the student's.
        beta: How steep it is.
    """
    return torch.sigmoid(beta * (1.0 - (1.0 - entropy) * (1.0 - gap)))


def unit(gate: Tensor) -> Tensor:
    """Return the gate times two, so that beta 0 is a factor of 1 (ours)."""
    return 2.0 * gate


def centered(gate: Tensor, mask: Tensor, pool: Tensor | None = None) -> Tensor:
    """Return each gate minus the mean of all the other tokens' (ours); 0 for a token alone.

    As a baseline does for a reward, it takes from ``sdar_map`` the noise of what all gates have in
    common. The expectation stays what it was if a token does not change later gates; else what it
    does to their mean is held against it.

    Args:
        gate: The gate of each token.
        mask: bool: the tokens.
        pool: The gates ``[P]`` of all tokens of the optimizer step, these among them; None is
            these alone.
    """
    pool = gate[mask] if pool is None else pool
    count = len(pool)
    return torch.where(mask, (count * gate - pool.sum()) / max(count - 1, 1), 0.0)


def sdar_map(student_logprob: Tensor, teacher_logprob: Tensor, gate: Tensor) -> Tensor:
    """Return ``gate (log pT - log pS)`` of sampled tokens, whose gradient is that of the student.

    SDAR's code. The gradient is ``-gate grad log pS``: a policy gradient with the gate for a
    reward, and not that of a divergence. On the student's own samples its expectation is 0 at
    beta 0, and for a small beta ``beta / 4`` times that of KL(student || teacher) (ours).
    """
    return gate.detach() * (teacher_logprob.detach() - student_logprob)
