"""Policy gradients of sampled tokens: advantages, clipped losses, and their means.

Formulas are those of TRL 1.16's GRPOTrainer unless another source is named. Maps are ``[B, A]``,
losses to minimize, float32 as their inputs are.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Scale = Literal["group", "batch", "none"]
Ratio = Literal["token", "sequence"]
Mean = Literal["grpo", "dr-grpo", "dapo"]
Reweighting = Literal["rlsd", "rlrt"]
Importance = Literal["ratio", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask"]


@torch.no_grad()
def group_advantages(
    rewards: Tensor,
    group_size: int,
    scale: Scale = "group",
    *,
    pool: Tensor | None = None,
    epsilon: float = 1e-4,
) -> Tensor:
    """Return rewards ``[N]`` minus the mean of their group, in units of a deviation, ``[N]``.

    Groups are ``group_size`` rewards in a row, of answers to one question. Equal rewards come to
    exactly 0.

    Args:
        rewards: One for each answer.
        group_size: Answers to a question.
        scale: Divide by the standard deviation of the ``group`` (GRPO), of all rewards
            (``batch``), or by nothing (Dr. GRPO, arXiv:2503.20783). With Bessel's correction; of a
            single reward it is 0.
        pool: For ``batch``, all rewards ``[P]`` of the optimizer step; None is those given.
        epsilon: Added to the deviation.
    """
    groups = rewards.reshape(-1, group_size)
    groups = groups - groups[:, :1]  # equal rewards become zeros, whose mean is not rounded
    advantages = groups - groups.mean(1, keepdim=True)
    if scale == "none":
        return advantages.flatten()
    spread = groups if scale == "group" else (rewards if pool is None else pool).reshape(1, -1)
    deviation = spread.std(1, keepdim=True) if spread.shape[1] > 1 else torch.zeros_like(spread)
    return (advantages / (deviation + epsilon)).flatten()


def clipped_policy_map(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    *,
    ratio: Ratio,
    mask: Tensor,
    dual_clip: float | None = None,
) -> Tensor:
    """Return PPO's clipped loss of each token: ``-min(r A, clip(r, 1 - low, 1 + high) A)``.

    Args:
        logprob: The student's log-probability of each sampled token.
        old_logprob: That of the model which sampled it, or the student's own, detached, where the
            answers are fresh.
        advantages: ``[B]``, or ``[B, A]`` for each token.
        clip_low: 0.2 in GRPO and DAPO.
        clip_high: 0.2 in GRPO, 0.28 in DAPO (arXiv:2503.14476).
        ratio: The ratio r of a ``token``, or the geometric mean of those of its ``sequence``
            (GSPO, arXiv:2507.18071).
        mask: bool: the tokens of the answers.
        dual_clip: Largest ratio at any advantage; it matters where the advantage is negative, if
            it is above ``1 + clip_high`` (dual-clip PPO, 3 in SDAR; TRL's ``delta``).
    """
    change = _ratio(logprob, old_logprob, mask, ratio)
    advantages = _by_token(advantages)
    clipped = change.clamp(1.0 - clip_low, 1.0 + clip_high)
    if dual_clip is not None:
        change = change.clamp(max=dual_clip)
    return -torch.minimum(change * advantages, clipped * advantages).expand_as(logprob)


def cispo_map(
    logprob: Tensor,
    old_logprob: Tensor,
    advantages: Tensor,
    most: float,
    *,
    ratio: Ratio,
    mask: Tensor,
) -> Tensor:
    """Return ``-stopgrad(min(r, most)) A log p`` of each token: clipped, but never silenced.

    CISPO, in the form of ScaleRL (arXiv:2510.13786; ``most`` 5 there). The arguments are those of
    ``clipped_policy_map``.
    """
    change = _ratio(logprob, old_logprob, mask, ratio).clamp(max=most).detach()
    return -change * _by_token(advantages) * logprob


@torch.no_grad()
def sampler_weights(
    logprob: Tensor, sampler: Tensor, mask: Tensor, kind: Importance, most: float
) -> Tensor:
    """Return by how much tokens count that another model sampled than the student, ``[B, A]``.

    An inference engine is another model, if only by its rounding. With r the student's probability
    over the sampler's, of each token or of all tokens of its answer, it is ``min(r, most)``
    (``truncate``), or r where that is at most ``most`` and 0 elsewhere (``mask``). TRL 1.16's
    ``vllm_importance_sampling_mode``, without a lower bound.

    Args:
        logprob: The student's log-probability of each token.
        sampler: The sampler's, with the temperature, top-p and top-k that it sampled with.
        mask: bool: the tokens of the answers.
        kind: Which; not ``ratio``.
        most: The bound.
    """
    change = torch.where(mask, logprob - sampler, 0.0)
    level, _, bound = kind.partition("-")
    if level == "sequence":
        change = change.sum(1, keepdim=True).expand_as(logprob)
    ratio = change.exp()
    if bound == "truncate":
        return ratio.clamp(max=most)
    return torch.where(ratio <= most, ratio, 0.0)  # a ratio may be infinite, which no 0 undoes


def k3_penalty(logprob: Tensor, reference_logprob: Tensor) -> Tensor:
    """Return ``exp(d) - d - 1`` of sampled tokens, with ``d = log p_ref - log p``.

    Not negative. In expectation over the student's own samples its value is KL(student ||
    reference), but its gradient is that of KL(reference || student).
    """
    gap = reference_logprob.detach() - logprob
    return torch.expm1(gap) - gap


def aggregate(error: Tensor, mask: Tensor, kind: Mean, *, max_tokens: int) -> tuple[Tensor, int]:
    """Return the mean of a map as a scalar, and the ``count`` that its ``Loss`` is to have.

    The trainer's count-weighted mean over micro-batches and ranks is then the mean over all
    answers of the optimizer step.

    Args:
        error: A map ``[B, A]``.
        mask: bool: the tokens of the answers.
        kind: ``grpo``: over answers, of the mean over an answer's tokens. ``dr-grpo``: over
            answers, of the sum over its tokens by ``max_tokens``. ``dapo``: over tokens. Answers
            without a token count as 0 in the first two, and in the last not at all; where there is
            no token, its count is 1 nevertheless, so that a step of nothing is not divided by 0.
        max_tokens: Tokens of the longest answer that may be sampled; for ``dr-grpo`` alone.
    """
    kept = torch.where(mask, error, 0.0)
    if kind == "dapo":
        count = max(int(mask.sum()), 1)
        return kept.sum() / count, count
    divisor = mask.sum(1).clamp(min=1) if kind == "grpo" else max_tokens
    return (kept.sum(1) / divisor).mean(), len(error)


@torch.no_grad()
def reweighted_advantages(
    advantages: Tensor,
    student_logprob: Tensor,
    teacher_logprob: Tensor,
    mask: Tensor,
    *,
    form: Reweighting,
    share: float,
    clip: float,
    rewarded: Tensor | None = None,
) -> Tensor:
    """Return advantages of tokens ``[B, A]`` by what a teacher thinks of them, of the same sign.

    ``A ((1 - share) + share clip(w, 1 - clip, 1 + clip))``. In ``rlsd``
    ``w = (pT / pS)^sign(A)``, as SDAR's code has this baseline (share 0.5, falling to 0 over 100
    steps; clip 0.2): what the teacher likes is credited with success. In ``rlrt``
    (arXiv:2605.10781) w is the inverse: what the teacher would not have said is. We know RLRT
    from other people's notes alone (share 0.5; clip 1.0 for base models, 0.5 for instructed ones,
    0.2 for those that think).

    Args:
        advantages: ``[B]``.
        student_logprob: Of the sampled tokens.
        teacher_logprob: Likewise.
        mask: bool: the tokens of the answers; 0 is returned elsewhere.
        form: Which of the two.
        share: How much of the advantage is reweighted.
        clip: How far a weight may be from 1.
        rewarded: bool ``[B]``: the answers to do it for; None is all. RLRT does it for those with
            the reward 1, and collapses without (its notes).
    """
    gap = torch.where(mask, teacher_logprob - student_logprob, 0.0)
    sign = advantages.sign()[:, None] * (1.0 if form == "rlsd" else -1.0)
    weight = (sign * gap).exp().clamp(1.0 - clip, 1.0 + clip)
    factor = (1.0 - share) + share * weight
    if rewarded is not None:
        factor = torch.where(rewarded[:, None], factor, 1.0)
    return torch.where(mask, advantages[:, None] * factor, 0.0)


@torch.no_grad()
def informed_weights(gap: Tensor, mask: Tensor, gamma: float = 0.5) -> Tensor:
    """Return weights ``[B, A]`` that fall from ``1 + gamma`` to 1 as the gaps add up.

    IW-OPD (arXiv:2606.22600), from TRL's code: 1 plus gamma times the share of the answer's
    absolute gaps that is at this token or later. An early disagreement counts more, since what
    follows was written after it.

    Args:
        gap: The teacher's log-probability of each token minus that of the model that sampled it.
        mask: bool: the tokens of the answers; the weight is 0 elsewhere.
        gamma: What the first token has more than the last.
    """
    size = torch.where(mask, gap.abs(), 0.0)
    before = size.cumsum(1) - size
    share = 1.0 - before / size.sum(1, keepdim=True).clamp(min=1e-8)
    return torch.where(mask, 1.0 + gamma * share, 0.0)


def discounted(values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Return ``sum over s >= t of gamma^(s - t) values_s`` within each row, ``[B, A]``.

    Of rewards of tokens, the return from each on. Distances are in places, and values outside of
    the mask are 0.
    """
    total = torch.where(mask, values, 0.0)
    reach = 1  # so many terms are in the sum; each round doubles them
    while reach < total.shape[1]:
        total = total + gamma**reach * pad(total[:, reach:], (0, reach))
        reach *= 2
    return torch.where(mask, total, 0.0)


def _ratio(logprob: Tensor, old_logprob: Tensor, mask: Tensor, kind: Ratio) -> Tensor:
    """Return how much likelier tokens have become, ``[B, A]`` or, of sequences, ``[B, 1]``."""
    change = torch.where(mask, logprob - old_logprob.detach(), 0.0)
    if kind == "sequence":
        change = change.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return change.exp()


def _by_token(advantages: Tensor) -> Tensor:
    """Return detached advantages ``[B, 1]`` or ``[B, A]``."""
    return (advantages[:, None] if advantages.ndim == 1 else advantages).detach()
