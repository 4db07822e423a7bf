"""What log-probabilities of sampled tokens tell about a divergence, and policy gradients of it.

All take log-probabilities of the tokens y that the student sampled, maps of any shape, and are
unreduced. With p the student and q the teacher, each is an estimate of the reverse KL(p || q) if
y is drawn from p (Schulman, "Approximating KL divergence", 2020). As *losses* they are not: what
the gradient of an estimate estimates is another matter, and is said for each.
"""

import torch
from torch import Tensor


def k1(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the map ``log p(y) - log q(y)``: without bias, of either sign.

    As a loss it teaches nothing: its expected gradient, that of ``sum p``, is zero. It is a reward:
    see ``log_ratio``.
    """
    return student - teacher.detach()


def k2(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the map ``(log p(y) - log q(y))^2 / 2``: biased, never negative.

    As a loss its expected gradient is exactly that of the reverse KL(p || q).
    """
    return 0.5 * (student - teacher.detach()).square()


def k3(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the map ``r - 1 - log r`` of ``r = q(y) / p(y)``: without bias, never negative.

    As a loss its expected gradient is exactly that of the *forward* KL(q || p).
    """
    ratio = teacher.detach() - student
    return torch.expm1(ratio) - ratio


def log_ratio(student: Tensor, teacher: Tensor, reverse_kl: Tensor | None = None) -> Tensor:
    """Return the advantage ``log q(y) - log p(y)`` of each token, a constant: -k1 as a reward.

    Its policy gradient descends the reverse KL (Thinking Machines' on-policy distillation; eq. 4
    of Many Faces, arXiv:2605.11182). Its expectation under the student is ``-KL(p || q)``; less
    that baseline, which ``token_maps`` has from the same pass, the expected gradient is the same
    and its variance mostly smaller.

    Args:
        student: ``log p(y)``.
        teacher: ``log q(y)``; of a target that is not the teacher itself (G-OPD), ``log`` of that.
        reverse_kl: KL(p || q) at each place, for the exact baseline.
    """
    advantage = (teacher - student).detach()
    return advantage if reverse_kl is None else advantage + reverse_kl.detach()


def policy_gradient_map(logprob: Tensor, advantage: Tensor) -> Tensor:
    """Return the map ``-A log p(y)``, whose descent is REINFORCE with the advantage A, a constant.

    Tokens that were sampled from another distribution have to be weighted by ``p(y)`` over its own
    probability of y.
    """
    return -advantage.detach() * logprob
